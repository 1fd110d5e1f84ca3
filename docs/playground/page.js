// The page: a date, the gates, what the heads look at, and a frozen LLaMA that learns. ASSETS is put there by the builder
// (minillama/course/playground.py): config, weights, kernel, adapters, presets, fingerprint, the worker's script.
import { Memory } from "./matrix.js";
import { LLaMA } from "./llama.js";
import { AdamW, adapterOf, lossAndGradient } from "./train.js";
import { FORMATS, decode, encode, iso, languageName, truth, written } from "./dates.js";
import { readAdapter, readSafetensors, writeAdapter } from "./safetensors.js";
import { drawAttention, drawCurves, letter } from "./draw.js";
import { Pool, Run } from "./run.js";

const $ = (id) => document.getElementById(id), ASSETS = globalThis.ASSETS;
const bytes = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
const options = new URLSearchParams(location.search); // ?plain: without WebAssembly; ?workers=2
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// ── the model and its adapters ───────────────────────────────────────────────────────────────────────────────────────

const kernelBytes = bytes(ASSETS.kernel);
const kernel = options.has("plain") || !WebAssembly.validate(kernelBytes) ? null : kernelBytes;
const weights = bytes(ASSETS.weights).buffer;
const model = new LLaMA(ASSETS.config, readSafetensors(weights).tensors, new Memory(24, kernel));
const { L, H, V } = model;
const adapters = {}; // name -> {title, K, prompts, gates, tanh}
const LANGUAGES = ["fr", "fi", "de", "es", "it", "pt", "nl", "sv", "pl", "tr", "hu", "id"];
const READ = ["en", ...LANGUAGES]; // the languages whose dates the page recognises, to say right or wrong

const state = { text: "", adapter: "", factors: new Float32Array(L * H).fill(1), place: 6 };

/** What the model writes behind a text with the adapter's gates turned: {ids, logits}. */
function answer(text, adapter, factors) {
  return model.memory.within(() => model.generate(ids(text), { adapter: adapter && model.open(adapter, factors) }));
}

const ids = (text) => encode(`${text} = `);
const allAt = (factor) => new Float32Array(L * H).fill(factor);

/** All that the page shows of its state. */
function look({ text, adapter, factors, place }) {
  const started = performance.now(), used = adapters[adapter], prompt = ids(text);
  const now = answer(text, used, factors), base = answer(text, null);
  const whole = [...prompt, ...now.ids.slice(0, -1)], T = whole.length;
  const at = prompt.length - 1 + Math.min(place, now.ids.length - 1); // where the chosen character is written
  const reference = model.memory.within(() => {
    const { x, N } = model.forward([whole]);
    return model.logits(x, N).slice();
  });
  return model.memory.within(() => {
    const opened = model.open(used, factors), run = model.forward([whole], { adapter: opened, keep: true }), { K } = used;
    const logits = model.logits(run.x, T), bits = (array) => new Uint32Array(array.buffer, array.byteOffset, array.length);
    const [mine, theirs] = [bits(logits), bits(reference)];
    let differ = 0, furthest = 0;
    for (let i = 0; i < mine.length; i++) {
      differ += mine[i] !== theirs[i];
      furthest = Math.max(furthest, Math.abs(logits[i] - reference[i]));
    }
    const heads = [];
    for (let layer = 0; layer < L; layer++) {
      for (let head = 0; head < H; head++) {
        const { onTokens, onPrompts } = run.layers[layer], row = head * T + at;
        heads.push({
          layer,
          head,
          opening: opened.openings[layer * H + head],
          prompts: onPrompts[0].slice(row * K, (row + 1) * K),
          tokens: onTokens[0].slice(row * T, row * T + at + 1),
        });
      }
    }
    const seen = whole.slice(0, at + 1), milliseconds = performance.now() - started;
    return { text, now, base, differ, furthest, compared: mine.length, heads, seen, right: truth(text, READ), milliseconds };
  });
}

// ── drawing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

const probability = (logits, id) => 1 / logits.reduce((sum, logit) => sum + Math.exp(logit - logits[id]), 0);
const verdict = (written, right) => (right ? (decode(written) === `${right}\n` ? "right" : "wrong") : "");

/** The characters of an answer; those that can be chosen are buttons, among which the arrow keys move. */
function boxes(host, { ids, logits }, right, chosen = null) {
  const wanted = right && encode(`${right}\n`), focused = host.contains(document.activeElement);
  host.replaceChildren(...ids.map((id, i) => {
    const share = probability(logits[i], id), name = `${letter(id)}, ${(100 * share).toFixed(1)} %`;
    const box = element(chosen === null ? "span" : "button", { className: "box", textContent: letter(id), title: name });
    if (wanted) box.classList.add(wanted[i] === id ? "right" : "wrong");
    box.style.setProperty("--p", share.toFixed(3));
    if (chosen === null) return box;
    box.ariaLabel = name;
    box.ariaPressed = i === chosen;
    box.tabIndex = i === chosen ? 0 : -1;
    const choose = (place) => {
      state.place = Math.max(0, Math.min(ids.length - 1, place));
      draw();
    };
    box.onclick = () => choose(i);
    box.onkeydown = ({ key }) => ({ ArrowRight: () => choose(i + 1), ArrowLeft: () => choose(i - 1) })[key]?.();
    return box;
  }));
  if (focused) host.children[chosen]?.focus();
}

let last = null;
function draw() {
  const seen = (last = look(state)), place = Math.min(state.place, seen.now.ids.length - 1);
  boxes($("answer"), seen.now, seen.right, place);
  boxes($("base"), seen.base, seen.right);
  for (const [id, { ids }] of [["answer-verdict", seen.now], ["base-verdict", seen.base]]) {
    $(id).textContent = $(id).className = verdict(ids, seen.right);
  }
  const number = (value) => value.toLocaleString("en"), same = seen.differ === 0;
  $("identity").className = same ? "same" : "";
  $("identity").textContent = same
    ? `The base, bit for bit: of ${number(seen.compared)} logits (${seen.compared / V} places × ${V}), 0 differ in any bit.`
    : `${number(seen.differ)} of ${number(seen.compared)} logits differ from the base's, by up to ${seen.furthest.toPrecision(3)}.`;
  $("speed").textContent = `All of this took ${seen.milliseconds.toFixed(0)} ms, in ${kernel ? "WebAssembly" : "plain JavaScript"}.`;
  document.querySelectorAll("#gates .cell output").forEach((output, i) => {
    output.textContent = seen.heads[i].opening.toFixed(2);
  });
  drawAttention($("attention"), seen.heads, seen.seen);
  $("attention-caption").textContent = `Each row is a head, while the model writes “${letter(seen.now.ids[place])}”, character ${place + 1} of its answer. Left, what it takes from each of the prompts (orange adds, purple subtracts); right, where it looks in the text.`;
  $("attention-words").textContent = inWords(seen);
  tellHeight();
}

function inWords({ heads, seen }) {
  const most = (list) => list.indexOf(Math.max(...list));
  const taking = heads.map(({ opening, prompts }) => Math.abs(opening) * Math.max(...prompts));
  const looking = heads.map(({ tokens }) => Math.max(...tokens));
  const taker = heads[most(taking)], looker = heads[most(looking)], at = most([...looker.tokens]);
  return `Most is taken by head ${taker.head} of layer ${taker.layer}, ${(taker.opening < 0 ? "−" : "") + Math.max(...taking).toFixed(2)} from prompt ${most([...taker.prompts]) + 1}. The most certain look: head ${looker.head} of layer ${looker.layer}, ${(100 * Math.max(...looking)).toFixed(0)} % at “${letter(seen[at])}”, character ${at + 1} of ${seen.length}.`;
}

let waiting = false;
/** Draws before the next frame, however much has changed by then. */
function later() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw();
  });
}

// ── the date, the adapters, the gates ────────────────────────────────────────────────────────────────────────────────

function setAdapter(name) {
  state.adapter = $("adapter").value = name;
  later();
}

function setText(text) {
  state.text = $("date").value = text;
  later();
}

/** Turns every gate to the same factor, or each to its own, (L·H). */
function setFactors(factors) {
  state.factors.set(typeof factors === "number" ? allAt(factors) : factors);
  document.querySelectorAll("#gates .cell input").forEach((slider, i) => (slider.value = state.factors[i]));
  document.querySelectorAll("#gates .layer input").forEach((slider, l) => (slider.value = state.factors[l * H]));
  if (typeof factors === "number") {
    $("all").value = factors;
    $("all-value").textContent = factors.toFixed(2);
  }
  later();
}

function addAdapter(name, title, adapter) {
  adapters[name] = { ...adapter, title };
  $("adapter").replaceChildren(...Object.entries(adapters).map(([value, { title }]) => element("option", { value, textContent: title })));
}

function gateSliders() {
  const slider = (label, oninput) => {
    const made = element("input", { type: "range", min: 0, max: 2, step: 0.05, value: 1, ariaLabel: label });
    made.oninput = () => oninput(+made.value);
    return made;
  };
  $("gates").style.setProperty("--heads", H);
  $("gates").append(element("span"), ...Array.from({ length: H }, (_, h) => element("span", { className: "head", textContent: `head ${h}` })));
  for (let l = 0; l < L; l++) {
    const whole = slider(`all gates of layer ${l}`, (value) => setFactors(state.factors.map((factor, i) => (Math.floor(i / H) === l ? value : factor))));
    $("gates").append(element("span", { className: "layer head" }, `layer ${l}`, whole));
    for (let h = 0; h < H; h++) {
      const one = slider(`gate of layer ${l}, head ${h}`, (value) => {
        state.factors[l * H + h] = value;
        later();
      });
      $("gates").append(element("span", { className: "cell" }, one, element("output")));
    }
  }
}

// ── the story ────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Each step: a sentence, the answer that this tab computes for it now, and a button that sets the page so. */
function tour({ telling, layer }) {
  const french = adapters.fr, closed = allAt(1).map((factor, i) => (Math.floor(i / H) === layer.layer ? 0 : factor));
  const steps = [
    { say: "The base knows English, and nothing changes it from here on: its 791,680 weights are frozen.", text: "March 3, 2021", factors: allAt(0) },
    { say: "French was never taught. Some dates it guesses by their numbers and first letters; this one it gets wrong.", text: telling.fr, factors: allAt(0) },
    { say: "Beside each layer now stand ten learned prompts, and each head has a gate: 5,136 numbers, 0.65 % of the base. With the gates as they were trained it reads French.", text: telling.fr, factors: allAt(1) },
    { say: "More is not better: opened twice as far, the same gates spoil the answer.", text: telling.fr, factors: allAt(2) },
    { say: `The layers share the work. With the gates of layer ${layer.layer} alone at 0, this date goes wrong.`, text: layer.text, factors: closed },
  ];
  const items = steps.map(({ say, text, factors }) => {
    const { ids } = answer(text, french, factors), mark = verdict(ids, truth(text, READ));
    const shown = element("code", {}, `${text} = `, element("b", { className: mark, textContent: decode(ids).trim() }));
    const button = element("button", { textContent: "set the page so" });
    button.ariaLabel = `set the page so: ${text}`;
    button.onclick = () => {
      setAdapter("fr");
      setText(text);
      const even = factors.every((factor) => factor === factors[0]);
      setFactors(even ? factors[0] : factors);
      $("ask-title").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
    };
    return element("li", {}, say, element("div", { className: "shown" }, shown, element("span", { className: mark, textContent: mark }), button));
  });
  const train = element("button", { textContent: "train French here" });
  train.onclick = () => {
    $("language").value = "fr";
    $("start").value = "0";
    $("train-title").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
    $("train").click();
  };
  const lastStep = element("li", {}, "None of this is a film. In a hundred steps a new adapter learns French in this tab: its gates begin at 0, so that the first step starts from the base and only the gates move in it. Begin them at 1 and see what the zero is for.", element("div", { className: "shown" }, train));
  $("tour").replaceChildren(...items, lastStep);
}

// ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────

let pool = null, runs = [], stopped = false;

function openPool() {
  const spare = Math.max(1, Math.min(4, navigator.hardwareConcurrency ?? 2));
  pool ??= Pool.open(ASSETS.worker, +(options.get("workers") ?? spare), { config: ASSETS.config, weights, kernel });
  return pool;
}

/** Trains one run, or two side by side, tests before and after, and keeps the adapters. */
async function train({ language, steps, starts, dates = 200, seed = 0 }) {
  const name = languageName(language), days = [30_000, 44_259, 61_234];
  const texts = days.map((day, i) => written(day, FORMATS[2 - i], language));
  stopped = false;
  $("result").textContent = "";
  $("progress").textContent = "opening the workers …";
  const open = await openPool();
  runs = starts.map((gate) => Object.assign(new Run(model, open, { language, steps, seed, gate }), { name: `gates from ${gate}` }));
  $("progress").textContent = "testing the base …";
  const before = await runs[0].test(dates, true), started = performance.now();
  for (let step = 0; step < steps && !stopped; step++) {
    for (const run of runs) await run.step();
    const seconds = (performance.now() - started) / 1000, now = runs.map((run) => run.history[step].loss.toFixed(3)).join(" and ");
    $("progress").textContent = `step ${step + 1} of ${steps} · loss ${now} · ${seconds.toFixed(0)} s · ${open.workers.length} workers`;
    const tenth = step % 10 === 9 || step === steps - 1;
    if (tenth) {
      const answers = await runs[0].answers(texts);
      $("samples").replaceChildren(...texts.map((text, i) => element("p", {}, `${text} = `, element("b", { className: verdict(answers[i], iso(days[i])), textContent: decode(answers[i]).trim() }))));
    }
    if (tenth || (!calm && step % 3 === 2)) {
      drawCurves($("curves"), runs);
      tellHeight();
      await new Promise((resolve) => setTimeout(resolve)); // lets the page live
    }
  }
  const seconds = (performance.now() - started) / 1000, after = [];
  for (const run of runs) after.push(await run.test(dates));
  runs.forEach((run, i) => addAdapter(`${language}-${starts[i]}`, `${name}, learned here${starts[i] ? `, gates from ${starts[i]}` : ""}`, run.adapter));
  const percent = (share) => `${(100 * share).toFixed(1)} %`, learned = runs.map((run, i) => `${percent(after[i])} with ${run.name}`);
  $("result").textContent = `${name}, ${dates} dates never trained on: ${percent(before)} before; after ${runs[0].history.length} steps of 16 in ${seconds.toFixed(0)} s, ${learned.join(" and ")}. The base's weights were not touched.`;
  setText(texts[1]);
  setFactors(1);
  setAdapter(`${language}-${starts[0]}`);
  return { before, after, seconds, losses: runs.map((run) => run.history.map(({ loss }) => loss)) };
}

/** What a click on the button does: it starts, or ends early what runs. */
async function trainOrStop() {
  if ($("train").textContent === "stop") {
    stopped = true;
    return;
  }
  const language = $("language").value === "other" ? $("tag").value.trim() : $("language").value;
  const starts = { 0: [0], 1: [1], race: [0, 1] }[$("start").value];
  $("train").textContent = "stop";
  try {
    await train({ language, steps: Math.max(1, Math.min(2000, Math.round(+$("steps").value || 100))), starts });
  } catch (error) {
    $("progress").textContent = "";
    $("result").textContent = error.message;
  } finally {
    $("train").textContent = "train";
    tellHeight();
  }
}

// ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────

async function save() {
  try {
    const file = new Blob([await writeAdapter(adapters[state.adapter], model, ASSETS.fingerprint)]);
    const link = element("a", { href: URL.createObjectURL(file), download: "adapter_model.safetensors" });
    link.click();
    $("file-message").textContent = "";
  } catch (error) {
    $("file-message").textContent = error.message;
  }
}

async function open() {
  const [file] = $("open").files;
  try {
    addAdapter(file.name, file.name, await readAdapter(await file.arrayBuffer(), model, ASSETS.fingerprint));
    setAdapter(file.name);
    $("file-message").textContent = `${file.name} is open`;
  } catch (error) {
    $("file-message").textContent = `${file.name}: ${error.message}`;
  }
  $("open").value = "";
}

// ── the page as a whole ──────────────────────────────────────────────────────────────────────────────────────────────

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  if (last) draw();
  drawCurves($("curves"), runs);
}

/** Inside a lesson: the page around this one says light or dark, and makes room for it. */
function tellHeight() {
  if (parent !== window) parent.postMessage({ minillama: "height", height: document.documentElement.scrollHeight }, "*");
}

async function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.documentElement.classList.toggle("inside", parent !== window);
  document.documentElement.classList.toggle("lesson", options.has("lesson")); // whose text has told the story
  addEventListener("message", ({ data }) => data?.minillama === "theme" && setTheme(data.theme));
  dark.onchange = () => parent === window && setTheme(dark.matches ? "dark" : "light");
  $("theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  addEventListener("resize", () => {
    later();
    drawCurves($("curves"), runs);
  });

  for (const [name, file] of Object.entries(ASSETS.adapters)) {
    addAdapter(name, languageName(name), await readAdapter(bytes(file).buffer, model, ASSETS.fingerprint));
  }
  gateSliders();
  const { presets, telling } = ASSETS.story;
  $("presets").append(...presets.map(({ text, adapter }) => {
    const chip = element("button", { textContent: text });
    chip.onclick = () => {
      setAdapter(adapter);
      setText(text);
    };
    return chip;
  }));
  $("date").oninput = () => setText($("date").value);
  $("adapter").onchange = () => setAdapter($("adapter").value);
  $("all").oninput = () => setFactors(+$("all").value);
  document.querySelectorAll("button.all").forEach((button) => (button.onclick = () => setFactors(+button.value)));
  $("save").onclick = save;
  $("open").onchange = open;
  $("language").append(...LANGUAGES.map((tag) => element("option", { value: tag, textContent: languageName(tag) })));
  $("language").append(element("option", { value: "other", textContent: "another …" }));
  $("language").onchange = () => ($("tag").hidden = $("language").value !== "other");
  $("train").onclick = trainOrStop;

  state.text = $("date").value = telling.fr;
  state.adapter = $("adapter").value = "fr";
  document.documentElement.dataset.theme = dark.matches ? "dark" : "light";
  tour(ASSETS.story);
  draw();
  drawCurves($("curves"), runs);
  if (parent !== window) parent.postMessage({ minillama: "ready" }, "*");
  document.documentElement.dataset.ready = "yes";
}

// For the tests, and for a curious reader's console.
globalThis.playground = {
  model, adapters, state, weights, kernel, answer, look, setText, setFactors, setAdapter, train,
  Memory, LLaMA, AdamW, adapterOf, lossAndGradient, readSafetensors, writeAdapter, written, encode, decode,
};
start();
