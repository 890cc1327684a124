// What fits instead: every combination, the longest sample, every card. These answers take longer and come in turns.

let focused = ""; // the combination whose button was pressed, and is to keep the focus
let asked = 0; // the last question's number: answers to earlier ones are dropped

// Runs steps one after the other, with room for the browser to react in between.
async function inTurns(steps) {
  const mine = asked;
  for (const step of steps) {
    await new Promise((resume) => setTimeout(resume));
    if (mine !== asked) return;
    step();
  }
}

// The largest number from `low` on that holds, or null; the steps of the search are run in turns.
async function largest(low, high, holds) {
  const mine = asked;
  if (!holds(low)) return null;
  while (low < high) {
    await new Promise((resume) => setTimeout(resume));
    if (mine !== asked) return undefined;
    const middle = Math.ceil((low + high) / 2);
    if (holds(middle)) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Stretches of lengths in which longer samples need more memory, the longest first: a packed row has a fixed number there.
function stretches(chosen, most) {
  const row = Number(chosen.packing), samples = Number(chosen.micro_batch) * (chosen.ga ? Number(chosen.steps) : 1);
  if (!row) return [[2, most]];
  const found = [];
  for (let n = 1; n <= samples; n++) {
    const low = n < samples ? Math.floor(row / (n + 1)) + 2 : 2, high = n > 1 ? Math.floor(row / n) + 1 : most;
    if (low <= Math.min(high, most)) found.push([low, Math.min(high, most)]);
  }
  return found;
}

function combinationsOf(chosen) {
  const found = [];
  for (let bits = 0; bits < 16; bits++) {
    const on = { gc: !!(bits & 8), ga: !!(bits & 4), mp: !!(bits & 2), lora: !!(bits & 1) };
    const frozen = chosen.frozen.startsWith("nf4") ? ["compute", chosen.frozen] : [chosen.frozen, "nf4"];
    for (const each of on.mp && on.lora ? frozen : [chosen.frozen]) found.push({ ...chosen, ...on, frozen: each });
  }
  return found;
}

function nameOf(each) {
  const on = ["ga", "mp", "lora", "gc"].filter((name) => each[name]).map((name) => LABELS[name]).join("+") || "baseline";
  return each.mp && each.lora && each.frozen.startsWith("nf4") ? `${on}, NF4` : on;
}

// Memory, verdict and speed, as cells of a table.
function cellsOf(found) {
  if (found.refused) return ["–", "not planned", "–"];
  const speed = found.tokensPerSecond === null ? "–" : number(found.tokensPerSecond);
  return [number(found.needed), verdict(found), speed];
}

function rowKind(found) {
  return found.refused ? "off" : found.fits ? (found.hasRoom ? "good" : "tight") : "bad";
}

function combinationButton(each) {
  const button = element("button", nameOf(each), { type: "button", class: "link" });
  button.addEventListener("click", () => {
    show({ ga: each.ga, mp: each.mp, lora: each.lora, gc: each.gc, ...(each.mp && each.lora ? { frozen: each.frozen } : {}) });
    focused = nameOf(each);
    answer();
  });
  return button;
}

function fastest(found) {
  const fitting = found.filter(({ plan: { refused, fits } }) => !refused && fits);
  const roomy = fitting.filter(({ plan: { hasRoom } }) => hasRoom);
  const from = roomy.length ? roomy : fitting;
  return from.reduce((best, each) => {
    if (!best) return each;
    const [a, b] = [each.plan, best.plan];
    if (a.tokensPerSecond === null) return a.needed < b.needed ? each : best;
    return a.tokensPerSecond > b.tokensPerSecond ? each : best;
  }, null);
}

async function answerMore(chosen, card) {
  const advice = { fastest: "…", longest: "…", smallest: "…" };
  const say = () => $("advice").replaceChildren(...Object.values(advice).map((line) => element("li", line)));
  const found = [];
  say();
  await inTurns(combinationsOf(chosen).map((each) => () => found.push({ each, plan: attempt(each, card) })));
  if (found.length < combinationsOf(chosen).length) return;
  const isSame = ({ each }) => TECHNIQUES.every((name) => each[name] === chosen[name]) && (each.frozen === chosen.frozen || !(chosen.mp && chosen.lora));
  const heading = ["combination", "MiB needed", "verdict", "tokens/s at best"];
  table($("combinations"), heading, found.map((row) => ({
    cells: [combinationButton(row.each), ...cellsOf(row.plan)],
    kind: `${rowKind(row.plan)}${isSame(row) ? " chosen" : ""}`,
  })));
  if (focused) [...document.querySelectorAll("#combinations button")].find((button) => button.textContent === focused).focus();
  focused = "";
  const is4Bit = ({ each }) => each.mp && each.lora && each.frozen.startsWith("nf4");
  const alike = found.filter(({ each }) => each.ga === chosen.ga); // GA changes how many samples an update has
  const best = fastest(alike.filter((row) => !is4Bit(row))) || fastest(alike);
  const title = best && best.plan.tokensPerSecond === null ? "Least memory" : "Fastest that fits";
  advice.fastest = best
    ? `${title}, ${is4Bit(best) ? "with" : "without"} 4-bit weights${chosen.ga ? " and with GA" : ""}: ${nameOf(best.each)}, ${number(best.plan.needed)} MiB${best.plan.hasRoom ? "" : "; less than 5 % to spare"}.`
    : "No combination fits. Choose shorter samples, a smaller micro-batch, more cards or a larger card.";
  say();

  const model = modelOf(chosen);
  const fitsAt = (length) => attempt({ ...chosen, length: String(length) }, card).fits;
  let longest = null;
  for (const [low, high] of stretches(chosen, model.max_seq_len)) {
    longest = await largest(low, high, fitsAt);
    if (longest === undefined) return;
    if (longest !== null) break;
  }
  const most = longest === model.max_seq_len ? ", the model's whole context" : "";
  advice.longest = longest === null ? "With these choices no sample is short enough." : `Longest samples that fit with these choices: ${number(longest)} tokens${most}.`;
  say();

  const rows = [];
  const cards = Object.entries(DATA.cards);
  await inTurns(cards.map(([name, each]) => () => rows.push({ name, each, plan: attempt(chosen, each) })));
  if (rows.length < cards.length) return;
  table($("all_cards"), ["card", "MiB", "MiB needed", "verdict", "tokens/s at best"], rows.map((row) => ({
    cells: [row.name, number(row.each.memory_mib), ...cellsOf(row.plan)], kind: `${rowKind(row.plan)}${row.name === chosen.card ? " chosen" : ""}`,
  })));
  const fitting = rows.filter((row) => row.plan.fits), small = fitting.find((row) => row.plan.hasRoom) || fitting[0];
  advice.smallest = small ? `Smallest card on which these choices fit: ${small.name}.` : "These choices fit no card in the list.";
  say();
}
