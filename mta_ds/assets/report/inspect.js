"use strict";
const boxes = [...document.querySelectorAll("#labels input")];
const chosenOnly = document.querySelector("#chosen-only");
const height = document.querySelector("#height");

function markField(field, passes) {
  const active = JSON.parse(field.dataset.constituents)
    .map((unit) => passes(unit.labels, unit.height) && (unit.chosen || !chosenOnly.checked));
  const pieces = [...field.querySelectorAll("[data-c]")];
  const covers = pieces.map((piece) => new Set(piece.dataset.c.split(" ").filter((i) => i && active[i])));
  const none = new Set();
  pieces.forEach((piece, n) => {
    const own = [...covers[n]];
    const before = covers[n - 1] ?? none;
    const after = covers[n + 1] ?? none;
    piece.classList.toggle("phrase", own.length > 0);
    for (const depth of [1, 2, 3]) piece.classList.toggle(`depth-${depth}`, Math.min(own.length, 3) === depth);
    piece.classList.toggle("opens", own.some((i) => !before.has(i)));
    piece.classList.toggle("closes", own.some((i) => !after.has(i)));
  });
}

function apply() {
  const ticked = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
  const highest = Number(height.value);
  const passes = (labels, level) => level <= highest && labels.some((label) => ticked.has(label));
  document.querySelector("#height-shown").textContent = height.value;
  for (const field of document.querySelectorAll(".field")) markField(field, passes);
  for (const node of document.querySelectorAll(".tree [data-labels]"))
    node.classList.toggle("muted", !passes(node.dataset.labels.split(" "), Number(node.dataset.height)));
}

for (const input of document.querySelectorAll(".filters input")) input.addEventListener("input", apply);
apply();
