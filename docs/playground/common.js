// What the page's parts share: the model, its adapters, the state that is shown, and helpers. ASSETS is put there by
// minillama/course/playground.py: config, weights, kernel, adapters, fingerprint, story and the worker's script.
import { Memory } from "./matrix.js";
import { LLaMA } from "./llama.js";
import { decode, encode } from "./dates.js";
import { readSafetensors } from "./safetensors.js";

export const ASSETS = globalThis.ASSETS;
export const $ = (id) => document.getElementById(id);
export const bytes = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
export const options = new URLSearchParams(location.search); // ?plain: without WebAssembly; ?workers=2
export const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// ── the model and its adapters ───────────────────────────────────────────────────────────────────────────────────────

const kernelBytes = bytes(ASSETS.kernel);
export const kernel = options.has("plain") || !WebAssembly.validate(kernelBytes) ? null : kernelBytes;
export const weights = bytes(ASSETS.weights).buffer;
export const model = new LLaMA(ASSETS.config, readSafetensors(weights).tensors, new Memory(24, kernel));
export const { L, H, V } = model;
export const adapters = {}; // name -> {title, K, prompts, gates, tanh}
export const LANGUAGES = ["fr", "fi", "de", "es", "it", "pt", "nl", "sv", "pl", "tr", "hu", "id"];
export const READ = ["en", ...LANGUAGES]; // whose dates the page recognises, to say right or wrong

export const state = { text: "", adapter: "", factors: new Float32Array(L * H).fill(1), place: 6 };

/** What the model writes behind a text with the adapter's gates turned: {ids, logits}. */
export function answer(text, adapter, factors) {
  return model.memory.within(() => model.generate(ids(text), { adapter: adapter && model.open(adapter, factors) }));
}

export const ids = (text) => encode(`${text} = `);
export const allAt = (factor) => new Float32Array(L * H).fill(factor);

/** "right" or "wrong", or nothing where nobody knows. */
export const verdict = (written, right) => (right ? (decode(written) === `${right}\n` ? "right" : "wrong") : "");

/** Inside a lesson: the page around this one says light or dark, and makes room for it. */
export function tellHeight() {
  if (parent === window) return;
  // of what is in the body: the root's would be the frame's own height and what it grows by, for ever
  const height = Math.ceil(document.body.getBoundingClientRect().height);
  parent.postMessage({ minillama: "height", height }, "*");
}
