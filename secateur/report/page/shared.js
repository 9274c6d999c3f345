// What all parts of the page share: the data, elements, numbers as text, the tooltip, and which entry is chosen.

const SVG = "http://www.w3.org/2000/svg";
const HTML = "http://www.w3.org/1999/xhtml";

const byId = (id) => document.getElementById(id);

const data = JSON.parse(byId("data").textContent);

/** Add an element to `parent`. What comes from the data goes in as text or as the value of an attribute, never as markup. */
function add(parent, name, attributes = {}, text = "") {
  const namespace = name === "svg" || parent.namespaceURI === SVG ? SVG : HTML;
  const element = document.createElementNS(namespace, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== "") element.textContent = text;
  parent.append(element);
  return element;
}

/** The sign of a family of methods, around (x, y) where these are given. */
function addMark(parent, family, x, y, size = 16) {
  const place = x === undefined ? {} : { x: x - size / 2, y: y - size / 2, width: size, height: size };
  return add(parent, "use", { href: `#mark-${family}`, class: family, ...place });
}

// --- numbers as text

function number(value, digits = 4) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "not a number" : value > 0 ? "∞" : "−∞";
  const large = Math.abs(value);
  if (large >= 1e6 || (large < 1e-4 && large > 0)) return value.toExponential(2).replace("e+", "e");
  return value.toLocaleString("en", { maximumSignificantDigits: digits });
}

const percent = (value, digits = 4) => `${number(100 * value, digits)} %`;

const show = {
  bytes: (value) => `${number(value / data.unit.bytes)} ${data.unit.name}`,
  bits_per_weight: number,
  perplexity: number,
  kl: number,
  agreement: percent,
};

function upperFirst(text) {
  return text[0].toUpperCase() + text.slice(1);
}

// --- the tooltip

// Which element the tooltip is about. Another may ask for it before this one has let go.
let tipOwner = null;

/** Show lines, the first of them as a title, above or below a box on the screen. */
function showTip(owner, lines, box) {
  const tip = byId("tip");
  tipOwner = owner;
  tip.replaceChildren();
  lines.forEach((line, i) => add(tip, i ? "span" : "b", {}, line));
  tip.hidden = false;
  const left = box.left + box.width / 2 - tip.offsetWidth / 2;
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = `${Math.max(8, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${above >= 8 ? above : box.bottom + 8}px`;
}

function hideTip(owner) {
  if (owner === tipOwner) byId("tip").hidden = true;
}

// --- which entry is chosen

const chosen = { index: 0, told: [] };

/** Call `tell` with the index of the entry whenever another one is chosen. */
function onChoice(tell) {
  chosen.told.push(tell);
}

function choose(index) {
  chosen.index = index;
  for (const tell of chosen.told) tell(index);
}
