// The page: it puts its parts to work, saves and opens adapters, and lives in a lesson's frame.
import { Memory } from "./matrix.js";
import { LLaMA } from "./llama.js";
import { AdamW, adapterOf, lossAndGradient } from "./train.js";
import { decode, encode, languageName, written } from "./dates.js";
import { readAdapter, readSafetensors, writeAdapter } from "./safetensors.js";
import { $, adapters, answer, ASSETS, bytes, element } from "./common.js";
import { kernel, LANGUAGES, model, options, state, weights } from "./common.js";
import { addAdapter, draw, gateSliders, later, look, setAdapter, setFactors, setText } from "./shown.js";
import { drawRuns, tour, train, trainOrStop } from "./learn.js";
import { pictures, readPictures, setEyes, showPad, startPad } from "./pad.js";
import { picture_of } from "./vision.js";

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
    const adapter = await readAdapter(await file.arrayBuffer(), model, ASSETS.fingerprint);
    if (adapter.projection) {
      setEyes(adapter);
    } else {
      addAdapter(file.name, file.name, adapter);
      setAdapter(file.name);
    }
    const place = adapter.projection ? ": it reads what is drawn below" : "";
    $("file-message").textContent = `${file.name} is open${place}`;
  } catch (error) {
    $("file-message").textContent = `${file.name}: ${error.message}`;
  }
  $("open").value = "";
}

// ── the page as a whole ──────────────────────────────────────────────────────────────────────────────────────────────

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  drawAll();
}

function drawAll() {
  if (!state.adapter) return; // not before there is something to draw
  later();
  drawRuns();
  showPad();
}

async function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.documentElement.classList.toggle("inside", parent !== window);
  document.documentElement.classList.toggle("lesson", options.has("lesson")); // whose text has told the story
  document.documentElement.classList.toggle("pad", options.has("pad")); // lesson 10, which wants the pad alone
  addEventListener("message", ({ data }) => data?.minillama === "theme" && setTheme(data.theme));
  dark.onchange = () => parent === window && setTheme(dark.matches ? "dark" : "light");
  $("theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  addEventListener("resize", drawAll);

  for (const [name, file] of Object.entries(ASSETS.adapters)) {
    addAdapter(name, languageName(name), await readAdapter(bytes(file).buffer, model, ASSETS.fingerprint));
  }
  gateSliders();
  const { presets, telling } = ASSETS.story;
  $("presets").append(
    ...presets.map(({ text, adapter }) => {
      const chip = element("button", { textContent: text });
      chip.onclick = () => {
        setAdapter(adapter);
        setText(text);
      };
      return chip;
    }),
  );
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
  drawRuns();
  startPad(await readAdapter(bytes(ASSETS.sighted).buffer, model, ASSETS.fingerprint));
  if (parent !== window) parent.postMessage({ minillama: "ready" }, "*");
  document.documentElement.dataset.ready = "yes";
}

// For the tests, and for a curious reader's console.
globalThis.playground = {
  model,
  adapters,
  state,
  weights,
  kernel,
  answer,
  look,
  setText,
  setFactors,
  setAdapter,
  train,
  Memory,
  LLaMA,
  AdamW,
  adapterOf,
  lossAndGradient,
  readSafetensors,
  writeAdapter,
  written,
  encode,
  decode,
  picture_of,
  pictures,
  readPictures,
};
start();
