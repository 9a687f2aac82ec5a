"use strict";
// Contexts are in the page as text; this draws, for the token under the pointer or the focus, where its z comes from.
const data = JSON.parse(document.getElementById("data").textContent);
const live = document.getElementById("live");
const SHOWN = 6;
let mode = "z";

function decode(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Uint16Array(bytes.buffer);
}

const signed = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(Math.abs(x) < 0.0995 ? 3 : 2);
const percent = (x) => (100 * x).toFixed(x < 0.0995 ? 1 : 0) + " %";

// Attention and z of one query over all columns of sources. Row i holds the sources before the window and 0..i of the window.
function rows(context, i) {
  context.decoded ??= decode(context.a);
  const b = context.before, first = i * b + (i * (i + 1)) / 2, n = b + i + 1;
  const a = Array.from(context.decoded.subarray(first, first + n), (x) => x / 65535);
  const z = a.map((x, j) => x * context.v[j]);
  if (context.zb.length) z[1] = context.zb[i];
  return { a, z };
}

function cell(row, text, className) {
  const td = row.insertCell();
  if (text !== undefined) td.textContent = text;
  if (className) td.className = className;
  return td;
}

function bar(td, share, className) {
  const span = document.createElement("span");
  span.className = "bar " + className;
  span.style.width = Math.min(100, 100 * share).toFixed(1) + "%";
  td.append(span);
}

class View {
  constructor(element, context) {
    this.context = context;
    this.tokens = [...element.querySelectorAll("[data-j]")];
    this.table = element.querySelector("table.sources");
    this.pinned = context.before + context.peak;
    const text = element.querySelector(".text");
    text.addEventListener("pointerover", (e) => this.is(e, (j) => this.draw(j)));
    text.addEventListener("pointerleave", () => this.draw(this.pinned));
    text.addEventListener("click", (e) => this.is(e, (j) => { this.pinned = j; this.focus(j); }));
    text.addEventListener("focusin", (e) => this.is(e, (j) => { this.pinned = j; this.draw(j); this.say(j); }));
    text.addEventListener("keydown", (e) => this.key(e));
    for (const gap of element.querySelectorAll(".gap")) gap.addEventListener("click", () => element.classList.add("whole"));
    this.draw(this.pinned);
  }

  is(event, action) {
    const token = event.target.closest("[data-j]");
    if (token && +token.dataset.j >= this.context.before) action(+token.dataset.j);
  }

  key(event) {
    const on = +(event.target.dataset.j ?? this.pinned), first = this.context.before, last = this.tokens.length - 1;
    const visible = (j, step) => { while (this.tokens[j] && !this.tokens[j].offsetParent) j += step; return j; };
    const to = { ArrowLeft: visible(on - 1, -1), ArrowRight: visible(on + 1, 1), Home: visible(first, 1), End: visible(last, -1),
      Escape: first + this.context.peak }[event.key];
    if (to === undefined || to < first || to > last) return;
    event.preventDefault();
    this.focus(to);
  }

  focus(j) {
    for (const token of this.tokens) if (token.tabIndex === 0) token.tabIndex = -1;
    this.tokens[j].tabIndex = 0;
    this.tokens[j].focus();
  }

  draw(j) {
    this.drawn = j;
    const i = j - this.context.before, { a, z } = rows(this.context, i);
    const values = mode === "z" ? z : a, total = values.reduce((sum, x) => sum + Math.abs(x), 0) || 1;
    // Numbers over neighbouring tokens would cover each other: the larger one is written.
    const written = [];
    for (const k of [...values.keys()].sort((one, other) => Math.abs(values[other]) - Math.abs(values[one])))
      if (Math.abs(values[k]) / total >= 0.05 && written.every((near) => Math.abs(near - k) > 2)) written.push(k);
    this.tokens.forEach((token, number) => {
      const share = number < values.length ? Math.abs(values[number]) / total : 0;
      token.classList.toggle("here", number === j);
      token.classList.toggle("source", share >= 0.01);
      token.classList.toggle("minus", share >= 0.01 && values[number] < 0);
      token.classList.toggle("grey", mode !== "z");
      token.style.setProperty("--s", share.toFixed(3));
      if (written.includes(number)) token.dataset.z = mode === "z" ? signed(values[number]) : percent(values[number]);
      else delete token.dataset.z;
    });
    this.list(i, a, z);
  }

  name(j) {
    return this.tokens[j].classList.contains("between") ? null : this.tokens[j].textContent;
  }

  list(i, a, z) {
    const { context } = this, body = this.table.tBodies[0], foot = this.table.tFoot;
    const total = z.reduce((sum, x) => sum + x, 0), size = z.reduce((sum, x) => sum + Math.abs(x), 0) || 1;
    const order = [...z.keys()].sort((one, other) => Math.abs(z[other]) - Math.abs(z[one]) || a[other] - a[one]);
    const top = order.slice(0, SHOWN), rest = order.slice(SHOWN);
    body.replaceChildren();
    foot.replaceChildren();
    for (const j of top) {
      const row = body.insertRow(), name = cell(row);
      const word = document.createElement("span");
      word.className = this.name(j) === null ? "soft" : "word";
      word.textContent = this.name(j) ?? "added up";
      const back = context.positions[context.before + i] - context.positions[j];
      name.append(word);
      cell(row, this.name(j) === null ? "" : back ? String(back) : "itself", "n");
      cell(row, signed(z[j]), "n");
      bar(cell(row), Math.abs(z[j]) / size, z[j] < 0 ? "minus" : "plus");
      cell(row, percent(a[j]), "n");
      bar(cell(row), a[j], "");
    }
    const add = (values) => rest.reduce((sum, j) => sum + values[j], 0);
    if (rest.length) {
      const row = foot.insertRow();
      cell(row, `${rest.length} others`); cell(row, "", "n"); cell(row, signed(add(z)), "n"); cell(row); cell(row, percent(add(a)), "n"); cell(row);
    }
    const row = foot.insertRow();
    cell(row, context.act[i] ? "activation" : total > 0 ? "sum, not kept" : "sum, not active"); cell(row, "", "n"); cell(row, signed(total), "n"); cell(row); cell(row, "", "n"); cell(row);
    this.table.caption.textContent = `z of “${this.name(context.before + i)}” by source`;
    this.top = top.slice(0, 3).map((j) => `${this.name(j) ?? "tokens in between"} ${signed(z[j])}`);
  }

  say(j) {
    const activation = this.context.act[j - this.context.before];
    live.textContent = `${this.name(j)}: ${activation ? "activation " + activation.toFixed(2) : "not active"}. From ${this.top.join(", ")}.`;
  }
}

const views = [...document.querySelectorAll(".context")].map((element) => new View(element, data.contexts[+element.dataset.context]));
for (const input of document.querySelectorAll("input[name=draw]")) {
  input.addEventListener("change", () => { mode = input.value; for (const view of views) view.draw(view.drawn); });
}
document.getElementById("whole")?.addEventListener("change", (e) => document.body.classList.toggle("whole", e.target.checked));
