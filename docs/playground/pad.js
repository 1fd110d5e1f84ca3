// The pad: eight fields for the digits of a day, which the frozen LLaMA reads through the encoder of vision.js.
import { iso } from "./dates.js";
import { Encoder, picture_of, seeing, SIDE } from "./vision.js";
import { readSafetensors } from "./safetensors.js";
import { $, answer, ASSETS, bytes, element, model, tellHeight, verdict } from "./common.js";
import { boxes } from "./shown.js";

const DIGITS = 8; // YYYYMMDD
const PLACES = ["year", "year", "year", "year", "month", "month", "day", "day"];
const eye = new Encoder(readSafetensors(bytes(ASSETS.encoder).buffer).tensors, model.memory);
const handwritten = ASSETS.story.digits.map(bytes); // of each digit some handwritten ones, 64 counts each
let sighted = null; // the adapter

/** A field: strokes, drawn here; or picture and digit, of a stored one. */
const fields = Array.from({ length: DIGITS }, () => ({ strokes: [] }));
const isEmpty = ({ strokes, picture }) => !picture && !strokes.length;

/** The picture (8, 8) of a field as the encoder takes it, counts from 0 to 16. */
function pictureOf({ strokes, picture }) {
  return picture ?? (strokes.length ? picture_of(strokes) : new Uint8Array(SIDE ** 2));
}

/** Eight pictures, counts (8, 64) one behind the other -> {features (8, F), ids, logits: (V,) of each}. */
export function readPictures(counts) {
  const features = eye.forward(Float32Array.from(counts, (count) => count / 16));
  return { features, ...answer("?", seeing(sighted, features)) };
}

export const pictures = () => fields.flatMap((field) => Array.from(pictureOf(field)));

/** Takes another image_prompt adapter. */
export function setEyes(opened) {
  sighted = opened;
  showPad();
}

// ── the fields ───────────────────────────────────────────────────────────────────────────────────────────────────────

function wipe(i) {
  fields[i] = { strokes: [] };
}

/** Puts a stored handwritten digit into a field, another one each time. */
function put(i, digit) {
  const some = handwritten[digit], n = Math.floor(Math.random() * (some.length / SIDE ** 2));
  fields[i] = { strokes: [], picture: some.slice(n * SIDE ** 2, (n + 1) * SIDE ** 2), digit };
}

function putExample() {
  const digits = iso(Math.floor(Math.random() * 73_049)).replaceAll("-", "");
  [...digits].forEach((digit, i) => put(i, +digit));
  showPad();
}

/** Draws the fields and, once all have ink, what is read. */
export function showPad() {
  const canvases = document.querySelectorAll("#fields canvas.field");
  canvases.forEach((canvas, i) => {
    drawField(canvas, fields[i], PLACES[i][0].toUpperCase());
    drawPicture(canvas.nextSibling, pictureOf(fields[i]));
    const state = isEmpty(fields[i]) ? "empty" : (fields[i].digit ?? "drawn");
    canvas.ariaLabel = `${PLACES[i]}, digit ${i + 1} of ${DIGITS}: ${state}`;
  });
  const empty = fields.filter(isEmpty).length;
  $("pad-message").textContent = empty ? `${empty} of ${DIGITS} fields are empty` : "";
  $("reading").hidden = empty > 0;
  if (!empty && sighted) {
    const digits = fields.map(({ digit }) => digit ?? "").join("");
    const right = digits.length < DIGITS ? null : digits.replace(/(....)(..)(..)/, "$1-$2-$3");
    const { ids, logits } = readPictures(pictures());
    boxes($("read"), { ids, logits }, right);
    $("read-verdict").textContent = $("read-verdict").className = verdict(ids, right);
    boxes($("blind"), answer("?", null), right);
  }
  tellHeight();
}

/** A field's canvas, sharp on any screen: its strokes, the stored digit's pixels, or faintly what belongs there. */
function drawField(canvas, { strokes, picture }, hint = "") {
  const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const color = getComputedStyle(canvas).color;
  Object.assign(context, { fillStyle: color, strokeStyle: color, lineCap: "round", lineJoin: "round" });
  Object.assign(context, { lineWidth: width / 12, textAlign: "center", textBaseline: "middle" });
  if (picture) {
    const pixel = Math.min(width, height) / SIDE, left = (width - SIDE * pixel) / 2, top = (height - SIDE * pixel) / 2;
    picture.forEach((count, i) => {
      context.globalAlpha = count / 16;
      const x = left + (i % SIDE) * pixel, y = top + Math.floor(i / SIDE) * pixel;
      context.fillRect(x, y, pixel + 0.3, pixel + 0.3);
    });
  }
  if (isEmpty({ strokes, picture })) {
    Object.assign(context, { font: `${width / 2}px system-ui, sans-serif`, globalAlpha: 0.15 });
    context.fillText(hint, width / 2, height / 2);
  }
  for (const stroke of strokes) {
    context.beginPath();
    for (const [x, y] of [stroke[0], ...stroke]) context.lineTo(x * width, y * width);
    context.stroke();
  }
}

/** What the encoder takes, a pixel of the canvas for each of its numbers. */
function drawPicture(canvas, picture) {
  const context = canvas.getContext("2d"), [red, green, blue] = getComputedStyle(canvas).color.match(/\d+/g);
  const image = context.createImageData(SIDE, SIDE);
  picture.forEach((count, i) => image.data.set([red, green, blue, Math.round((255 * count) / 16)], 4 * i));
  context.putImageData(image, 0, 0);
}

function field(i) {
  const canvas = element("canvas", { className: "field", tabIndex: 0, role: "img" });
  const small = element("canvas", { className: "small", width: SIDE, height: SIDE });
  small.ariaHidden = "true";
  let pen = null; // the pointer that draws
  const point = ({ clientX, clientY }) => {
    const { left, top, width } = canvas.getBoundingClientRect();
    return [(clientX - left) / width, (clientY - top) / width];
  };
  canvas.onpointerdown = (event) => {
    if (pen !== null || event.button > 0) return;
    if (fields[i].picture) wipe(i); // drawn over, a stored digit makes room
    pen = event.pointerId;
    canvas.setPointerCapture(pen);
    fields[i].strokes.push([point(event)]);
    showPad();
  };
  canvas.onpointermove = (event) => {
    if (event.pointerId !== pen) return;
    const moves = event.getCoalescedEvents?.() ?? [];
    fields[i].strokes.at(-1)?.push(...(moves.length ? moves : [event]).map(point));
    drawField(canvas, fields[i]);
  };
  canvas.onpointerup = canvas.onpointercancel = ({ pointerId }) => {
    if (pointerId !== pen) return;
    pen = null;
    showPad();
  };
  canvas.onkeydown = ({ key, ctrlKey, metaKey, altKey }) => {
    const goTo = (place) => document.querySelectorAll("#fields canvas.field")[place]?.focus();
    if (ctrlKey || metaKey || altKey) return;
    if (/^[0-9]$/.test(key)) {
      put(i, +key);
      goTo(i + 1);
    } else if (key === "Backspace" || key === "Delete") {
      wipe(i);
    } else return void { ArrowRight: () => goTo(i + 1), ArrowLeft: () => goTo(i - 1) }[key]?.();
    showPad();
  };
  return element("span", { className: "digit" }, canvas, small);
}

export function startPad(opened) {
  sighted = opened;
  $("fields").append(...fields.map((_, i) => field(i)));
  $("example").onclick = putExample;
  $("clear").onclick = () => {
    fields.forEach((_, i) => wipe(i));
    showPad();
  };
  showPad();
}
