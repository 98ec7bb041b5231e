"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const canvas = document.querySelector("#view canvas");
const context = canvas.getContext("2d");
const state = { stage: data.stages.length, head: 1, iteration: data.iterations, object: null, cluster: null, pixel: null };
const picture = new Image();

async function inflate(text, type) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new type(await new Response(stream).arrayBuffer());
}

async function load() {
  for (const stage of data.stages) {
    stage.clusters = await inflate(stage.clusters, Uint16Array);
    stage.shares = await inflate(stage.shares, Uint8Array);
    stage.places = await inflate(stage.places, Float32Array);
  }
  for (const object of data.objects) {
    object.heat.values = await inflate(object.heat.values, Uint8Array);
    if (object.mask) object.mask.values = await inflate(object.mask.values, Uint8Array);
  }
  picture.src = data.picture;
  await picture.decode();
  const scale = Math.max(1, Math.min(4, 720 / Math.max(picture.width, picture.height)));
  canvas.width = Math.round(picture.width * scale);
  canvas.height = Math.round(picture.height * scale);
  $("view").style.aspectRatio = canvas.width + " / " + canvas.height;
}

/* The strongest clusters of a map's pixel, with their shares in [0, 1]; none at padding. */
function read(pixel) {
  const stage = data.stages[state.stage - 1];
  const size = stage.height * stage.width;
  const start = (state.iteration * stage.heads + state.head - 1) * stage.kept * size + pixel;
  const found = [];
  for (let rank = 0; rank < stage.kept; rank++) {
    const share = stage.shares[start + rank * size] / 255;
    if (share > 0) found.push({ cluster: stage.clusters[start + rank * size], share });
  }
  return found;
}

function pixelAt([x, y]) {
  const stage = data.stages[state.stage - 1];
  const clip = (value, side) => Math.max(0, Math.min(side - 1, Math.floor(value * side)));
  return clip(y, stage.height) * stage.width + clip(x, stage.width);
}

/* Draws a small map over the picture; colour gives [red, green, blue, alpha] of each of its pixels. */
function overlay(height, width, colour) {
  const small = new OffscreenCanvas(width, height);
  const image = new ImageData(width, height);
  for (let pixel = 0; pixel < height * width; pixel++) image.data.set(colour(pixel), 4 * pixel);
  small.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

function drawClusters(opacity) {
  const stage = data.stages[state.stage - 1];
  const marked = state.pixel ? read(pixelAt(state.pixel))[0]?.cluster : state.cluster;
  overlay(stage.height, stage.width, (pixel) => {
    const first = read(pixel)[0];
    if (!first) return [0, 0, 0, 0];
    const strength = marked == null || first.cluster === marked ? 1 : 0.3;
    return [...data.colours[first.cluster], 255 * opacity * strength * (0.25 + 0.75 * first.share)];
  });
}

function drawHeat(object, opacity) {
  const { height, width, values } = object.heat;
  const most = Math.max(1, ...values);
  overlay(height, width, (pixel) => {
    const heat = values[pixel] / most;
    return [255, 255 * heat, 0, 255 * Math.min(1, opacity + 0.25) * heat];
  });
}

function drawPaths() {
  const stage = data.stages[state.stage - 1];
  const place = (iteration, cluster) => {
    const start = ((iteration * stage.heads + state.head - 1) * stage.num_clusters + cluster) * 2;
    return [stage.places[start + 1] * canvas.width, stage.places[start] * canvas.height];
  };
  const unit = Math.max(canvas.width, canvas.height) / 320;
  for (let cluster = 0; cluster < stage.num_clusters; cluster++) {
    const points = [];
    for (let iteration = 0; iteration <= state.iteration; iteration++) points.push(place(iteration, cluster));
    if (points.some(([x, y]) => isNaN(x) || isNaN(y))) continue;
    context.beginPath();
    points.forEach(([x, y], number) => (number ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.lineWidth = unit;
    context.strokeStyle = "white";
    context.stroke();
    const [x, y] = points[points.length - 1];
    context.beginPath();
    context.arc(x, y, 2 * unit, 0, 7);
    context.fillStyle = `rgb(${data.colours[cluster]})`;
    context.fill();
    context.stroke();
  }
}

function drawOutline(object, selected) {
  context.lineWidth = (selected ? 2.5 : 1.2) * Math.max(canvas.width, canvas.height) / 320;
  context.strokeStyle = `rgb(${object.colour})`;
  if (object.box) {
    const [left, top, right, bottom] = object.box;
    context.strokeRect(left * canvas.width, top * canvas.height, (right - left) * canvas.width, (bottom - top) * canvas.height);
    return;
  }
  const { height, width, values } = object.mask;
  const inside = (row, column) => row >= 0 && column >= 0 && row < height && column < width && values[row * width + column];
  const x = canvas.width / width, y = canvas.height / height;
  context.beginPath();
  for (let row = 0; row <= height; row++) {
    for (let column = 0; column <= width; column++) {
      const here = inside(row, column);
      if (!!here !== !!inside(row - 1, column)) { context.moveTo(column * x, row * y); context.lineTo((column + 1) * x, row * y); }
      if (!!here !== !!inside(row, column - 1)) { context.moveTo(column * x, row * y); context.lineTo(column * x, (row + 1) * y); }
    }
  }
  context.stroke();
}

function line(text, className) {
  const element = document.createElement("div");
  element.textContent = text;
  if (className) element.className = className;
  return element;
}

function shareLine({ cluster, share }) {
  const row = line("", "share");
  const parts = ["i", "span", "b", "span"].map((tag) => row.appendChild(document.createElement(tag)));
  parts[0].style.background = `rgb(${data.colours[cluster]})`;
  parts[1].textContent = "cluster " + cluster;
  parts[2].style.width = 100 * share + "%";
  parts[3].textContent = share.toFixed(2);
  row.dataset.cluster = cluster;
  row.dataset.share = share.toFixed(2);
  return row;
}

function writeReading() {
  const reading = $("reading"), object = data.objects[state.object];
  reading.replaceChildren();
  if (object) {
    reading.append(line(object.text));
    reading.append(line(`${object.kind} of centre ${object.query}: the heat is the share of each pixel in it (decoder, mean of the heads)`, "note"));
    const button = document.createElement("button");
    button.textContent = `its cluster in stage ${data.stages.length}`;
    button.id = "origin";
    button.onclick = () => update({ object: null, stage: data.stages.length, cluster: object.query, pixel: null });
    reading.append(button);
  } else if (state.pixel) {
    reading.append(...read(pixelAt(state.pixel)).map(shareLine));
    if (!reading.children.length) reading.append(line("padding"));
  } else if (state.cluster != null) {
    reading.append(line("cluster " + state.cluster));
  } else {
    reading.append(line("Point at the picture.", "note"));
  }
}

function draw() {
  context.imageSmoothingEnabled = picture.width > 256;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const opacity = $("opacity").value / 100, object = data.objects[state.object];
  if (object) drawHeat(object, opacity);
  else drawClusters(opacity);
  if (!object && $("paths").checked) drawPaths();
  data.objects.forEach((other, number) => {
    if (number === state.object || (!object && other.box)) drawOutline(other, number === state.object);
  });
}

function writeControls() {
  const stage = data.stages[state.stage - 1];
  const ranges = { stage: [1, data.stages.length], head: [1, stage.heads], iteration: [0, data.iterations] };
  for (const [name, [least, most]] of Object.entries(ranges)) {
    state[name] = Math.max(least, Math.min(most, state[name]));
    Object.assign($(name), { min: least, max: most, value: state[name] });
    $(name + "-text").textContent = state[name] + " of " + most;
  }
  $("opacity-text").textContent = $("opacity").value + " %";
  $("help").textContent = `Stage ${state.stage}: ${stage.num_clusters} clusters, a map of ${stage.map_size[1]} x ${stage.map_size[0]} pixels.` +
    (stage.step > 1 ? ` One in ${stage.step} is shown along each side.` : "") +
    (data.objects.length ? " Click an object to see the assignment that it was read from." : "");
  [...$("objects").children].forEach((button, number) => button.setAttribute("aria-pressed", number === state.object));
}

function update(change) {
  Object.assign(state, change);
  if (!data.objects[state.object]) state.object = null;
  writeControls();
  writeReading();
  draw();
  /* Without the pixel: browsers limit how often a page may change its address. */
  const shown = Object.entries(state).filter(([name, value]) => name !== "pixel" && value != null);
  const address = "#" + shown.map(([name, value]) => name + "=" + value).join("&");
  if (address !== location.hash) history.replaceState(null, "", address);
}

/* The state from the address, as update writes it there, and the pixel if an address names one. */
function fromAddress() {
  const change = {};
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    const numbers = value.split(",").map(Number);
    if (!(name in state) || numbers.some(isNaN) || numbers.length !== (name === "pixel" ? 2 : 1)) continue;
    change[name] = name === "pixel" ? numbers : Math.round(numbers[0]);
  }
  update(change);
}

function position(event) {
  const area = canvas.getBoundingClientRect();
  return [(event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height];
}

/* The smallest object under a point, so that those behind a large one can be reached. */
function objectAt([x, y]) {
  let best = null, least = Infinity;
  data.objects.forEach((object, number) => {
    const inBox = object.box && x >= object.box[0] && y >= object.box[1] && x <= object.box[2] && y <= object.box[3];
    const mask = object.mask;
    const inMask = mask && mask.values[Math.floor(y * mask.height) * mask.width + Math.floor(x * mask.width)];
    if ((inBox || inMask) && object.area < least) { best = number; least = object.area; }
  });
  return best;
}

function listen() {
  for (const name of ["stage", "head", "iteration"]) {
    $(name).addEventListener("input", (event) => update({ [name]: Number(event.target.value), object: null, ...(name === "stage" ? { cluster: null } : {}) }));
  }
  for (const name of ["opacity", "paths"]) $(name).addEventListener("input", () => update({}));
  canvas.addEventListener("pointermove", (event) => { if (state.object == null) update({ pixel: position(event), cluster: null }); });
  canvas.addEventListener("pointerleave", () => { if (state.object == null) update({ pixel: null }); });
  canvas.addEventListener("click", (event) => {
    const number = objectAt(position(event));
    update({ object: number === state.object ? null : number, cluster: null });
  });
  data.objects.forEach((object, number) => {
    const button = document.createElement("button");
    button.textContent = object.text;
    button.onclick = () => update({ object: state.object === number ? null : number, pixel: null, cluster: null });
    $("objects").append(button);
  });
  window.addEventListener("hashchange", fromAddress);
}

load().then(() => {
  listen();
  fromAddress();
  document.documentElement.dataset.ready = "true";
});
