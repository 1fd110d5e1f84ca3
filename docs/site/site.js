// The playground in a frame follows this page's light or dark, and gets the height that it asks for.
const dark = matchMedia("(prefers-color-scheme: dark)");
const frames = () => [...document.querySelectorAll("iframe.playground")];

function theme() {
  const chosen = document.body.dataset.theme;
  return chosen === "light" || chosen === "dark" ? chosen : dark.matches ? "dark" : "light";
}

function tell() {
  for (const frame of frames()) frame.contentWindow.postMessage({ minillama: "theme", theme: theme() }, "*");
}

addEventListener("message", ({ data, source }) => {
  const frame = frames().find(({ contentWindow }) => contentWindow === source);
  if (!frame) return;
  if (data?.minillama === "ready") tell();
  if (data?.minillama === "height") frame.style.height = `${data.height + 4}px`;
});
addEventListener("DOMContentLoaded", () => {
  new MutationObserver(tell).observe(document.body, { attributes: true, attributeFilter: ["data-theme"] });
  dark.addEventListener("change", tell);
});
