"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const runs = [...document.querySelectorAll("input[name=run]")];
const slider = document.getElementById("when");
const views = [];

const datasets = {}; // rows, as the charts want them
for (const [name, columns] of Object.entries(page.tables)) {
  const [first = []] = Object.values(columns);
  datasets[name] = first.map((_, i) => Object.fromEntries(Object.entries(columns).map(([key, values]) => [key, values[i]])));
  for (const row of datasets[name]) row.label = page.labels[row.run];
}

function look() { // of the charts, from the page's own colours
  const style = getComputedStyle(document.documentElement);
  const [ink, line] = ["--ink", "--line"].map((name) => style.getPropertyValue(name).trim());
  const axis = { labelColor: ink, titleColor: ink, gridColor: line, domainColor: line, tickColor: line, labelFontSize: 12, titleFontSize: 12 };
  const legend = { labelColor: ink, titleColor: ink };
  return { background: "transparent", axis, legend, view: { stroke: line }, font: "system-ui, sans-serif" };
}

function choose() { // the runs whose boxes are checked, everywhere
  const shown = runs.filter((box) => box.checked).map((box) => Number(box.value));
  for (const view of views) view.signal("shown", shown).runAsync();
  for (const part of document.querySelectorAll("[data-run]")) part.hidden = !shown.includes(Number(part.dataset.run));
}

async function draw() {
  const theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  // ast: expressions are interpreted, so that the page needs no right to run text. canvas: thousands of points, of which
  // a screen reader gets the chart's description instead. logLevel: errors; that a chart is empty is none.
  const options = { ast: true, renderer: "canvas", logLevel: 1, config: look(), tooltip: { theme } };
  options.actions = { export: true, source: false, compiled: false, editor: false };
  for (const view of views.splice(0)) view.finalize();
  for (const place of document.querySelectorAll("[data-chart]")) {
    views.push((await vegaEmbed(place, { ...page.charts[place.dataset.chart], datasets }, options)).view);
  }
  choose();
  document.body.dataset.drawn = theme;
}

function show() { // the newest grid of each run at the slider's step
  const step = page.steps[slider.value];
  const text = `step ${step.toLocaleString("en")}`;
  slider.setAttribute("aria-valuetext", text);
  document.getElementById("now").textContent = text;
  for (const frame of document.querySelectorAll("[data-frames]")) {
    const pictures = [...frame.querySelectorAll("img")];
    const newest = pictures.filter((picture) => Number(picture.dataset.step) <= step).at(-1);
    for (const picture of pictures) picture.hidden = picture !== newest;
    frame.querySelector("span").textContent = newest ? `step ${Number(newest.dataset.step).toLocaleString("en")}` : "none yet";
  }
}

for (const box of runs) box.addEventListener("change", choose);
for (const button of document.querySelectorAll("[data-all]")) {
  button.addEventListener("click", () => {
    for (const box of runs) box.checked = Boolean(button.dataset.all);
    choose();
  });
}
if (slider) {
  slider.addEventListener("input", show);
  show();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
