// Files of tensors, and adapters in them as minillama/adapters/storage.py has them: adapter_model.safetensors carries
// its own options, the fingerprint of its base and a hash of its numbers, so this one file is the whole adapter. A gate
// per head under a tanh is in no layout of PEFT's; the file has its form and name, and the `peft_type` "MINILLAMA".
import { adapterOf } from "./train.js";

/** {tensors: {name: {shape, data}}, metadata} of the bytes of a .safetensors file; float32, or float16 made that. */
export function readSafetensors(buffer) {
  const length = buffer.byteLength < 8 ? Infinity : Number(new DataView(buffer).getBigUint64(0, true));
  if (length > buffer.byteLength - 8) throw new Error("this is no safetensors file, or a part of one");
  let header;
  try {
    header = JSON.parse(new TextDecoder().decode(buffer.slice(8, 8 + length)));
  } catch {
    throw new Error("its header is no JSON: this is no safetensors file, or a damaged one");
  }
  const { __metadata__: metadata = {}, ...entries } = header;
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets }] of Object.entries(entries)) {
    if (dtype !== "F32" && dtype !== "F16") throw new Error(`${name} is ${dtype}; needed is F32 or F16`);
    const [start, end] = data_offsets.map((offset) => 8 + length + offset);
    if (end > buffer.byteLength) throw new Error(`${name} ends behind the file: it is cut off, copy it again`);
    const cut = buffer.slice(start, end);
    tensors[name] = { shape, data: dtype === "F32" ? new Float32Array(cut) : fromHalf(new Uint16Array(cut)) };
  }
  return { tensors, metadata };
}

/** Numbers of the bits of float16: a sign, five bits of exponent, ten of fraction. */
function fromHalf(bits) {
  return Float32Array.from(bits, (half) => {
    const exponent = (half >> 10) & 31, fraction = half & 1023;
    const size = exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24;
    return half & 0x8000 ? -size : size;
  });
}

/** The bytes of a .safetensors file. */
export function writeSafetensors(tensors, metadata) {
  const header = { __metadata__: metadata };
  const names = Object.keys(tensors).sort();
  let end = 0;
  for (const name of names) {
    const { shape, data } = tensors[name];
    header[name] = { dtype: "F32", shape, data_offsets: [end, (end += data.byteLength)] };
  }
  const json = new TextEncoder().encode(JSON.stringify(header));
  const padded = (json.length + 7) & ~7;
  const file = new Uint8Array(8 + padded + end).fill(32, 8, 8 + padded);
  new DataView(file.buffer).setBigUint64(0, BigInt(padded), true);
  file.set(json, 8);
  for (const name of names) {
    const { data } = tensors[name];
    file.set(
      new Uint8Array(data.buffer, data.byteOffset, data.byteLength),
      8 + padded + header[name].data_offsets[0],
    );
  }
  return file;
}

/** SHA-256 of names, dtypes, shapes and numbers, in the order of the names: `digest` of storage.py. */
async function digest(tensors) {
  if (!globalThis.crypto?.subtle) {
    throw new Error("a page that came over plain http cannot hash: open it from https, localhost or a folder");
  }
  const parts = [];
  for (const name of Object.keys(tensors).sort()) {
    const { shape, data } = tensors[name];
    const tuple = shape.length === 1 ? `${shape[0]},` : shape.join(", ");
    parts.push(`${name} torch.float32 (${tuple})`, data);
  }
  const bytes = new Uint8Array(await new Blob(parts).arrayBuffer());
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(hash, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The file of an adapter, for `minillama.load_adapter(model, folder)`. */
export async function writeAdapter({ K, prompts, gates, tanh }, { L, H, D }, fingerprint) {
  const tensors = {};
  for (let l = 0; l < L; l++) {
    const place = `layers.${l}.self_attn.llama_adapter`;
    tensors[`${place}.prompt`] = { shape: [K, D], data: prompts[l] };
    tensors[`${place}.gate`] = { shape: [H, 1, 1], data: gates.slice(l * H, (l + 1) * H) };
  }
  const options = { prompt_length: K, layers: null, gate: "head", tanh, join: "before", init: "normal" };
  const config = {
    peft_type: "MINILLAMA",
    parts: [{ method: "llama_adapter", ...options }],
    base_model_name_or_path: "dates-llama",
    task_type: "CAUSAL_LM",
    inference_mode: true,
  };
  return writeSafetensors(tensors, {
    format: "pt",
    base_fingerprint: fingerprint,
    adapter_config: JSON.stringify(config),
    numbers_sha256: await digest(tensors),
  });
}

/** The adapter in a file that minillama or this page wrote, one that takes pictures with its `projection`; throws a
 *  sentence where the page cannot run it. */
export async function readAdapter(buffer, model, fingerprint) {
  const { tensors, metadata } = readSafetensors(buffer);
  const { L, H, D } = model;
  if (!metadata.adapter_config)
    throw new Error("this file is no adapter of minillama's: `adapt` writes one, and this page");
  if (!sameBase(metadata.base_fingerprint ?? "", fingerprint))
    throw new Error("this adapter was trained on another base");
  const { parts = [] } = JSON.parse(metadata.adapter_config);
  const [{ method, ...part } = {}] = parts;
  const known = (method === "llama_adapter" && part.join === "before") || isPicture(method, part);
  if (parts.length !== 1 || !known || part.gate !== "head") {
    throw new Error(
      "this page runs one llama_adapter, or one image_prompt by places for handwriting, with a gate per head; " +
        "the file holds something else",
    );
  }
  if ((part.layers ?? L) !== L)
    throw new Error(`the adapter is for the top ${part.layers} layers; this page adapts all ${L}`);
  if (globalThis.crypto?.subtle && (await digest(tensors)) !== metadata.numbers_sha256) {
    throw new Error("its numbers are not those that were written: it is damaged, copy it again");
  }
  const numbers = (name, to) => {
    const { data } = tensors[name] ?? { data: [] };
    if (data.length !== to.length) throw new Error(`${name} has ${data.length} numbers; needed are ${to.length}`);
    to.set(data);
    return to;
  };
  const K = part.prompt_length ?? part.tokens;
  const adapter = adapterOf(model, K, new Float32Array(L * K * D + L * H));
  for (let l = 0; l < L; l++) {
    const place = `layers.${l}.self_attn.${method}`;
    numbers(`${place}.prompt`, adapter.prompts[l]);
    numbers(`${place}.gate`, adapter.gates.subarray(l * H, (l + 1) * H));
  }
  if (method === "image_prompt") {
    const place = "layers.0.self_attn.image_prompt.projection"; // one, shared by all layers
    const weight = numbers(`${place}.weight`, new Float32Array(D * part.features)); // (D, F)
    adapter.projection = { weight, bias: numbers(`${place}.bias`, new Float32Array(D)) };
  }
  return Object.assign(adapter, { tanh: part.tanh });
}

const isPicture = (method, { way, encoder, tokens }) =>
  method === "image_prompt" && way === "places" && encoder === "handwriting" && tokens === 8;

/** `same_base` of storage.py: the same names and shapes, and numbers as near as rounding leaves them. */
function sameBase(one, other) {
  if (one.length !== other.length || one.slice(0, 8) !== other.slice(0, 8)) return false;
  for (let i = 8; i < one.length; i += 4) {
    const apart = parseInt(one.slice(i, i + 4), 16) - parseInt(other.slice(i, i + 4), 16);
    if (((apart + 4) & 0xffff) > 8) return false;
  }
  return true;
}
