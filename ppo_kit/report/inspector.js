"use strict";
const prompts = JSON.parse(document.getElementById("data").textContent);
// Name -> [meaning, the value that has no colour]; a metric without such a value is coloured from its least.
const METRICS = {
  reward: ["reward of this token, with its KL penalty", 0],
  kl: ["KL to the reference at this token [nats]", 0],
  value: ["critic's value of the state before this token", 0],
  advantage: ["advantage: blue is better than expected", 0],
  return: ["return, the critic's target", 0],
  ratio: ["π(token) / π_old(token) after the step's update; underlined where the clip stops the gradient", 1],
  entropy: ["entropy of the distribution that it was drawn from [nats]", null],
  log_prob: ["log π(token) of the policy that sampled it [nats]", null],
  ref_log_prob: ["log π(token) of the reference [nats]", null],
};
const $ = (id) => document.getElementById(id);
const make = (tag, name, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
};
const BLUE = [0, 114, 178], ORANGE = [213, 113, 0];
let metric = null, shown = 0, chosen = null;

const columns = () => Object.keys(METRICS).filter((name) =>
  prompts.some((prompt) => prompt.steps.some((step) => name in step.tokens)));

const format = (value) => value === null || value === undefined ? "not finite"
  : typeof value === "boolean" ? (value ? "yes" : "no")
  : Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(2)
  : String(Math.round(value * 1e4) / 1e4);

// Share -1 … 1 of the colour: sign by side of the middle, size by the largest distance that is shown.
function range(name) {
  const values = prompts[shown].steps.flatMap((step) => step.tokens[name] || []).filter((x) => x !== null);
  const middle = METRICS[name][1], low = Math.min(...values), high = Math.max(...values);
  const reach = middle === null ? high - low : Math.max(high - middle, middle - low);
  return { low, high, middle, reach: reach || 1 };
}
const colour = (share) => {
  const [r, g, b] = share >= 0 ? BLUE : ORANGE;
  return `rgba(${r}, ${g}, ${b}, ${(0.62 * Math.min(1, Math.abs(share))).toFixed(3)})`;
};
const share = (value, { low, middle, reach }) =>
  value === null || value === undefined ? 0 : (value - (middle === null ? low : middle)) / reach;

function paint() {
  const limits = range(metric);
  for (const node of document.querySelectorAll(".token")) {
    const values = prompts[shown].steps[node.dataset.step].tokens[metric];
    node.style.background = values ? colour(share(values[node.dataset.at], limits)) : "";
  }
  const one = limits.middle !== null;
  $("low").textContent = format(one ? limits.middle - limits.reach : limits.low);
  $("high").textContent = format(one ? limits.middle + limits.reach : limits.high);
  $("scale").style.background = `linear-gradient(90deg, ${one ? colour(-1) + ", " : ""}#fff0, ${colour(1)})`;
  $("meaning").textContent = METRICS[metric][0];
  for (const button of $("metrics").children)
    button.setAttribute("aria-pressed", button.dataset.name === metric);
}

function showNumbers(node) {
  if (chosen) chosen.classList.remove("chosen");
  chosen = node;
  node.classList.add("chosen");
  const step = prompts[shown].steps[node.dataset.step], at = Number(node.dataset.at);
  const list = make("dl");
  for (const name of [...columns(), "clipped"]) {
    if (!(name in step.tokens)) continue;
    const row = make("div");
    row.append(make("dt", "", name), make("dd", "", format(step.tokens[name][at])));
    list.append(row);
  }
  const text = JSON.stringify(step.tokens.text[at]);
  $("numbers").replaceChildren(make("p", "", `${step.label}, token ${at + 1}: ${text}`), list);
}

function showPrompt() {
  const { prompt, steps } = prompts[shown];
  $("prompt").textContent = prompt;
  chosen = null;
  $("cards").replaceChildren(...steps.map((step, index) => {
    const card = make("section", "card"), tokens = make("div", "tokens");
    step.tokens.text.forEach((text, at) => {
      const clipped = step.tokens.clipped && step.tokens.clipped[at];
      const node = make("span", clipped ? "token clipped" : "token", text === "" ? "∅" : text);
      node.dataset.step = index;
      node.dataset.at = at;
      tokens.append(node, make("wbr"));  // a line breaks between tokens, not in one
    });
    card.append(make("h2", "", step.label), make("p", "facts", step.facts), tokens);
    return card;
  }));
  paint();
}

const tokenUnder = (event) => event.target instanceof Element && event.target.closest(".token");
$("cards").addEventListener("pointerover", (event) => { const node = tokenUnder(event); if (node) showNumbers(node); });
$("cards").addEventListener("click", (event) => { const node = tokenUnder(event); if (node) showNumbers(node); });
document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "SELECT" || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  const all = [...document.querySelectorAll(".token")];
  const at = all.indexOf(chosen) + (event.key === "ArrowRight" ? 1 : -1);
  if (all[at]) { showNumbers(all[at]); all[at].scrollIntoView({ block: "nearest" }); event.preventDefault(); }
});
prompts.forEach(({ prompt, steps }, index) => {
  const line = prompt.replace(/\s+/g, " ").trim().slice(-90);
  const node = make("option", "", `${line} (${steps.length} ${steps.length === 1 ? "step" : "steps"})`);
  node.value = index;
  $("prompts").append(node);
});
$("prompts").addEventListener("change", (event) => { shown = Number(event.target.value); showPrompt(); });
for (const name of columns()) {
  const button = make("button", "", name);
  button.type = "button";
  button.dataset.name = name;
  button.addEventListener("click", () => { metric = name; paint(); });
  $("metrics").append(button);
}
metric = columns().includes("advantage") ? "advantage" : columns()[0];
showPrompt();
