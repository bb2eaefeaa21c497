"use strict";
// The pictures: a slider on each, filter, order, and all judges' scores of the one in hand. Without it the page shows
// the same pairs side by side.
const tools = document.querySelector(".tools");
const gallery = document.querySelector(".gallery");
const tip = document.getElementById("scores");
const theme = document.querySelector(".theme");
const names = gallery.dataset.names.split("|");
const judges = [...tools.elements.judge.options].map(option => option.text);
const sections = [...gallery.querySelectorAll("details")];
const cards = [...gallery.querySelectorAll(".pair")].map(read);
const ordered = document.createElement("ul");
ordered.className = "pairs";
gallery.append(ordered);

function read(element) {
  const card = {
    element, home: element.parentElement, two: element.querySelector(".two"),
    text: element.querySelector(".prompt").textContent,
    first: element.dataset.first.split(" ").map(Number),
    second: element.dataset.second.split(" ").map(Number),
    shown: element.querySelectorAll("b"),
    slider: document.createElement("input"),
  };
  card.slider.type = "range";
  card.slider.setAttribute("aria-label", `${names[0]} left of the slider, ${names[1]} right: ${card.text}`);
  card.slider.setAttribute("aria-describedby", "scores");
  card.slider.addEventListener("input", () => cut(card, card.slider.value));
  card.two.append(card.slider);
  for (const event of ["pointerenter", "focusin"]) element.addEventListener(event, () => tell(card));
  for (const event of ["pointerleave", "focusout"]) element.addEventListener(event, () => { tip.hidden = true; });
  return card;
}

// `percent` of the picture, from the left, show the first image; the rest the second.
function cut(card, percent) {
  card.slider.value = percent;
  card.two.style.setProperty("--cut", percent);
}

function arrange() {
  const judge = Number(tools.elements.judge.value), order = tools.elements.order.value;
  const words = tools.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
  const rank = {
    gain: card => card.first[judge] - card.second[judge],
    loss: card => card.second[judge] - card.first[judge],
    near: card => Math.abs(card.second[judge] - card.first[judge]),
    first: card => -card.first[judge],
    second: card => -card.second[judge],
  }[order];
  for (const card of cards) {
    card.element.hidden = !words.every(word => card.text.toLowerCase().includes(word));
    card.shown[0].textContent = card.first[judge].toFixed(3);
    card.shown[1].textContent = card.second[judge].toFixed(3);
  }
  const inOrder = rank ? cards.toSorted((one, other) => rank(one) - rank(other)) : cards;
  for (const card of inOrder) (rank ? ordered : card.home).append(card.element);
  const visible = cards.filter(card => !card.element.hidden).length;
  for (const section of sections) {
    const found = words.length > 0 && section.querySelector(".pair:not([hidden])");
    section.hidden = Boolean(rank) || (words.length > 0 && !found);
    if (found) section.open = true;
  }
  tools.querySelector("output").textContent =
    `${visible} of ${cards.length} pairs. Move a picture's slider with the pointer, or Tab to it and press ← →.`;
}

function tell(card) {
  const rows = judges.map((judge, i) => {
    const difference = Number((card.second[i] - card.first[i]).toFixed(3));
    return [judge, card.first[i].toFixed(3), card.second[i].toFixed(3), (difference > 0 ? "+" : "") + difference.toFixed(3)];
  });
  const table = document.createElement("table");
  for (const cells of [["", ...names, "difference"], ...rows]) {
    const row = table.insertRow();
    for (const text of cells) row.insertCell().textContent = text;
    row.cells[3].className = cells[3].startsWith("+") ? "more" : cells[3].startsWith("-") ? "less" : "";
  }
  tip.replaceChildren(table);
  tip.hidden = false;
  const box = card.element.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8));
  const below = box.bottom + 4, above = box.top - tip.offsetHeight - 4;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${(below + tip.offsetHeight > innerHeight && above > 0 ? above : below) + scrollY}px`;
}

function colours() {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark"
    || (!document.documentElement.style.colorScheme && matchMedia("(prefers-color-scheme: dark)").matches);
  theme.textContent = dark ? "Light" : "Dark";
  return dark;
}

tools.addEventListener("submit", event => event.preventDefault());
tools.addEventListener("input", event => {
  if (event.target === tools.elements.all) for (const card of cards) cut(card, event.target.value);
  else arrange();
});
tools.elements.beside.addEventListener("click", () => {
  const slide = gallery.classList.toggle("slide");
  tools.elements.beside.setAttribute("aria-pressed", !slide);
});
theme.addEventListener("click", () => {
  document.documentElement.style.colorScheme = colours() ? "light" : "dark";
  colours();
});
addEventListener("keydown", event => { if (event.key === "Escape") tip.hidden = true; });

gallery.classList.add("slide");
tools.hidden = theme.hidden = false;
arrange();
colours();
