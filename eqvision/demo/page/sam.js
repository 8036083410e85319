"use strict";
// What the person sees: an image, prompts on it, and the mask that the server gives for them.

const element = (id) => document.getElementById(id);
const canvas = element("canvas"), pen = canvas.getContext("2d");
const COLOR = [30, 144, 255], INSIDE = "#28c83c", OUTSIDE = "#e12d28", BOX = "#ffc800";
const DRAG = 5; // pixels of the screen from which on a click is a box

let image = null; // {number, bitmap}
let prompts = []; // {point: [x, y, label]} or {box: [x1, y1, x2, y2]}, in the order in which they were made
let masks = [], chosen = 0, layer = null;
let start = null, frame = null; // where a drag began, and the box so far
let asked = 0; // answers to earlier questions are dropped

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

async function send(path, options) {
  const reply = await fetch(path, options);
  const answer = await reply.json();
  if (!reply.ok) throw new Error(answer.error);
  return answer;
}

async function guarded(work) {
  try { await work(); } catch (error) { say(error.message, true); }
  canvas.classList.remove("busy");
}

async function show(state) {
  element("model").textContent = state.model;
  if (!state.image) return;
  const blob = await (await fetch(`/image?${state.image}`)).blob();
  image = { number: state.image, bitmap: await createImageBitmap(blob) };
  [canvas.height, canvas.width] = state.size;
  canvas.hidden = false;
  element("empty").hidden = true;
  reset();
}

function upload(file) {
  return guarded(async () => {
    asked++;
    canvas.classList.add("busy");
    say(`Encoding ${file.name} ...`);
    const state = await send("/image", { method: "POST", body: file });
    await show(state);
    say(`${state.size[1]} x ${state.size[0]} pixels, encoded in ${state.seconds.toFixed(1)} s. Click on something.`);
  });
}

function reset() {
  prompts = [];
  ask();
}

function ask() {
  return guarded(async () => {
    const question = ++asked;
    for (const id of ["undo", "clear"]) element(id).disabled = prompts.length === 0;
    if (prompts.length === 0) { accept([]); return; }
    draw();
    canvas.classList.add("busy");
    const boxes = prompts.filter((each) => each.box);
    const request = {
      image: image.number,
      points: prompts.filter((each) => each.point).map((each) => each.point),
      box: boxes.length ? boxes[boxes.length - 1].box : null,
      choice: element("choice").value,
    };
    const answer = await send("/masks", { method: "POST", body: JSON.stringify(request) });
    if (question !== asked) return;
    accept(answer.masks);
    say(`Answered in ${(1000 * answer.seconds).toFixed(0)} ms.`);
  });
}

function accept(found) {
  masks = found;
  choose(0);
}

function choose(place) {
  chosen = place;
  layer = masks.length ? painted(masks[place].counts) : null;
  const list = element("masks");
  list.replaceChildren(...masks.map((mask, number) => {
    const button = document.createElement("button"), item = document.createElement("li");
    button.type = "button";
    button.textContent = `Mask ${number + 1}: expected IoU ${mask.iou.toFixed(2)}`;
    button.setAttribute("aria-pressed", String(number === chosen));
    button.addEventListener("click", () => choose(number));
    item.append(button);
    return item;
  }));
  element("save").hidden = layer === null;
  draw();
}

// Run lengths go down the columns, zeros first.
function pixels(counts) {
  const { width, height } = canvas, inside = new Uint8Array(width * height);
  let place = 0, value = 0;
  for (const count of counts) {
    if (value) for (let i = place; i < place + count; i++) inside[(i % height) * width + Math.floor(i / height)] = 1;
    place += count;
    value = 1 - value;
  }
  return inside;
}

function painted(counts) {
  const { width, height } = canvas, inside = pixels(counts), data = new ImageData(width, height);
  for (let i = 0; i < inside.length; i++) {
    if (!inside[i]) continue;
    const x = i % width;
    const isEdge = (x > 0 && !inside[i - 1]) || (x < width - 1 && !inside[i + 1])
      || (i >= width && !inside[i - width]) || (i + width < inside.length && !inside[i + width]);
    data.data.set([...COLOR, isEdge ? 255 : 120], 4 * i);
  }
  const sheet = document.createElement("canvas");
  [sheet.width, sheet.height] = [width, height];
  sheet.getContext("2d").putImageData(data, 0, 0);
  return sheet;
}

function draw() {
  if (!image) return;
  const unit = canvas.width / (canvas.clientWidth || canvas.width); // of a pixel on the screen
  pen.drawImage(image.bitmap, 0, 0);
  if (layer) pen.drawImage(layer, 0, 0);
  const boxes = frame ? [frame] : prompts.filter((each) => each.box).map((each) => each.box).slice(-1);
  pen.lineWidth = 2 * unit;
  pen.strokeStyle = BOX;
  for (const [x1, y1, x2, y2] of boxes) pen.strokeRect(x1, y1, x2 - x1, y2 - y1);
  for (const { point } of prompts.filter((each) => each.point)) {
    pen.beginPath();
    pen.arc(point[0], point[1], 6 * unit, 0, 2 * Math.PI);
    pen.fillStyle = point[2] ? INSIDE : OUTSIDE;
    pen.fill();
    pen.strokeStyle = "white";
    pen.stroke();
  }
}

function place(event) {
  const frame = canvas.getBoundingClientRect();
  const x = (event.clientX - frame.left) / frame.width * canvas.width;
  const y = (event.clientY - frame.top) / frame.height * canvas.height;
  return [Math.min(Math.max(x, 0), canvas.width), Math.min(Math.max(y, 0), canvas.height)];
}

canvas.addEventListener("contextmenu", (event) => event.preventDefault());
canvas.addEventListener("pointerdown", (event) => {
  if (!image || event.button > 2 || event.button === 1) return;
  canvas.setPointerCapture(event.pointerId);
  const label = event.button === 2 || event.shiftKey ? 0 : 1;
  start = { at: place(event), screen: [event.clientX, event.clientY], label };
});
canvas.addEventListener("pointermove", (event) => {
  if (!start || start.label === 0) return;
  const moved = Math.hypot(event.clientX - start.screen[0], event.clientY - start.screen[1]);
  if (!frame && moved < DRAG) return;
  const [[x1, y1], [x2, y2]] = [start.at, place(event)];
  frame = [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)];
  draw();
});
canvas.addEventListener("pointerup", () => {
  if (!start) return;
  const [box, begun] = [frame, start];
  start = frame = null;
  if (box && (box[2] - box[0] < 1 || box[3] - box[1] < 1)) { draw(); return; }
  prompts.push(box ? { box } : { point: [...begun.at, begun.label] });
  ask();
});
canvas.addEventListener("pointercancel", () => { start = frame = null; draw(); });

element("file").addEventListener("change", (event) => {
  if (event.target.files.length) upload(event.target.files[0]);
  event.target.value = "";
});
element("undo").addEventListener("click", () => { prompts.pop(); ask(); });
element("clear").addEventListener("click", reset);
element("choice").addEventListener("change", ask);
element("save").addEventListener("click", () => {
  const { width, height } = canvas, inside = pixels(masks[chosen].counts), data = new ImageData(width, height);
  for (let i = 0; i < inside.length; i++) data.data.set([255 * inside[i], 255 * inside[i], 255 * inside[i], 255], 4 * i);
  const sheet = document.createElement("canvas");
  [sheet.width, sheet.height] = [width, height];
  sheet.getContext("2d").putImageData(data, 0, 0);
  element("save").href = sheet.toDataURL("image/png");
});
const stage = element("stage");
for (const kind of ["dragover", "dragleave", "drop"]) {
  stage.addEventListener(kind, (event) => {
    event.preventDefault();
    stage.classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) upload(event.dataTransfer.files[0]);
  });
}
window.addEventListener("resize", draw);
guarded(async () => show(await send("/state")));
