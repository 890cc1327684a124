// The page's answers to what is chosen (choices.js).

const named = (name) => name.replaceAll("_", " ");
const verdict = (found) => (found.refused ? "not planned" : !found.fits ? "does not fit" : found.hasRoom ? "fits" : "tight");

function element(tag, text = "", attributes = {}, children = []) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function table(target, heading, rows) {
  const head = element("tr", "", {}, heading.map((name) => element("th", name, { scope: "col" })));
  const body = rows.map(({ cells, kind }) => {
    const [first, ...rest] = cells;
    const row = element("tr", "", kind ? { class: kind } : {}, [element("th", "", { scope: "row" })]);
    row.firstChild.append(first);
    row.append(...rest.map((cell) => element("td", cell)));
    return row;
  });
  target.replaceChildren(element("thead", "", {}, [head]), element("tbody", "", {}, body));
}

// The bytes at the peak by category, and then what is not in tensors.
function parts(found) {
  const sums = Object.fromEntries(DATA.categories.map((name) => [name, 0]));
  const counts = atPeak(found.memory);
  found.memory.kinds.forEach(([, category], kind) => (sums[category] += counts[kind] * found.memory.bytes[kind]));
  sums.other += rounded(found.card.workspace);
  const tensors = Object.entries(sums).map(([name, bytes]) => [named(name), mib(bytes)]);
  const unused = mib(found.memory.reserved) - found.peak;
  return [...tensors, ["reserved, not in use", unused], ["CUDA context", found.card.context_mib]].filter(([, value]) => value > 0.5);
}

function svg(width, height, label, content) {
  return `<svg viewBox="0 0 ${width} ${height}" preserveAspectRatio="none" role="img" aria-label="${label}">${content}</svg>`;
}

// The colors' meaning, each as [name, text to show after it].
function legend(entries, more = "") {
  const items = entries.map(([name, text = ""]) => `<li><i style="background:${COLORS[name] || "#6b6b6b"}"></i>${name}${text}</li>`);
  return `<ul class="legend">${items.join("")}${more}</ul>`;
}

function showBar(found) {
  const all = parts(found), most = Math.max(found.needed, found.card.memory_mib), scale = 1000 / (most * 1.02);
  let x = 0;
  const bars = all.map(([name, value]) => {
    const bar = `<rect x="${x}" y="4" width="${value * scale}" height="34" fill="${COLORS[name] || "#6b6b6b"}"/>`;
    x += value * scale;
    return bar;
  });
  const limit = found.card.memory_mib * scale;
  const line = `<path d="M${limit} 0V42" class="limit"/>`;
  const said = all.map(([name, value]) => `${name} ${number(value)} MiB`).join(", ");
  $("bar").innerHTML = svg(1000, 42, `Memory needed: ${said}; the card has ${number(found.card.memory_mib)} MiB`, bars.join("") + line) +
    legend(all.map(([name, value]) => [name, ` <b>${number(value)}</b>`]), '<li><i class="limit"></i>the card\'s memory</li>');
}

function showTimeline(found) {
  const points = timeline(found.memory), names = DATA.categories.filter((name) => points.some(([, at]) => at[name]));
  const limit = (found.card.memory_mib - found.card.context_mib) * MIB;
  const highest = Math.max(...points.map(([, at]) => names.reduce((sum, name) => sum + at[name], 0)));
  const most = (limit < 2 * highest ? Math.max(limit, highest) : highest) * 1.05, x = (n) => (n * 1000) / (points.length - 1);
  const y = (bytes) => 300 - (bytes * 300) / most;
  const below = points.map(() => 0);
  const areas = names.map((name) => {
    const low = below.map((bytes, n) => `${x(n).toFixed(1)},${y(bytes).toFixed(1)}`);
    points.forEach(([, at], n) => (below[n] += at[name]));
    const high = below.map((bytes, n) => `${x(n).toFixed(1)},${y(bytes).toFixed(1)}`);
    return `<polygon points="${[...high, ...low.reverse()].join(" ")}" fill="${COLORS[named(name)]}"/>`;
  });
  const changes = points.map(([phase], n) => [phase, n]).filter(([phase, n]) => !n || points[n - 1][0] !== phase);
  const marks = changes.map(([, n]) => `<path d="M${x(n)} 0V300" class="phase"/>`);
  const labels = changes.map(([phase, n], index) => `<span${index + 1 < changes.length ? ` style="left:${x(n) / 10}%"` : ""}>${phase}</span>`);
  const line = limit < most ? `<path d="M0 ${y(limit)}H1000" class="limit"/>` : "";
  const label = `Memory over an optimizer step, highest ${number(mib(highest))} MiB of tensors`;
  $("timeline").innerHTML = svg(1000, 300, label, areas.join("") + marks.join("") + line) + `<p>${labels.join("")}</p>` + legend(names.map((name) => [named(name)]));
}

function showTensors(found) {
  const counts = atPeak(found.memory), sums = new Map();
  found.memory.kinds.forEach(([, category, dtype], kind) => {
    const name = `${named(category)}|${dtype}`;
    sums.set(name, (sums.get(name) || 0) + counts[kind] * found.memory.bytes[kind]);
  });
  const workspaces = [["other|cuBLAS workspaces", rounded(found.card.workspace)]];
  const rows = [...sums, ...workspaces].filter(([, bytes]) => mib(bytes) >= 0.05).sort((a, b) => b[1] - a[1]);
  table($("tensors"), ["category", "dtype", "MiB"], rows.map(([name, bytes]) => ({ cells: [...name.split("|"), number(mib(bytes), 1)] })));
}

function command(chosen) {
  if (chosen.program === "other") return "This is another program's run: see its documentation.";
  const isCustom = chosen.model === "custom", words = ["llama-ft train", `model=${isCustom ? "from_checkpoint" : chosen.model}`, "checkpoint=DIR"];
  const preset = TECHNIQUES.slice(0, 3).filter((name) => chosen[name]).join("_") || "baseline";
  words.push(`optim=${preset}`);
  if (chosen.gc) words.push("optim.gc=true");
  if (chosen.mp && chosen.lora && chosen.frozen !== "compute") words.push(`mp.frozen_weights=${chosen.frozen.replace("_single", "")}`);
  if (chosen.mp && chosen.lora && chosen.frozen === "nf4_single") words.push("mp.double_quantization=false");
  if (chosen.mp && chosen.trainable !== "fp32") words.push(`mp.trainable_weights=${chosen.trainable}`);
  if (chosen.lora) words.push(`lora.rank=${Number(chosen.rank)}`);
  if (chosen.ga) words.push(`ga.steps=${Number(chosen.steps)}`);
  if (!chosen.lora && chosen.optimizer !== "adamw") words.push(`training.optimizer=${chosen.optimizer}`);
  words.push(`training.micro_batch_size=${Number(chosen.micro_batch)}`);
  if (chosen.packing) words.push(`training.packing=${Number(chosen.packing)}`);
  if (Number(chosen.cards) > 1) words.push("parallel=fsdp", `parallel.processes=${Number(chosen.cards)}`);
  return [...words, `data.max_length=${Number(chosen.length)}`, "data.path=FILE"].join(" ");
}

function answer() {
  asked++;
  const chosen = choices();
  $("memory_row").hidden = chosen.card !== "custom";
  for (const [id, used] of Object.entries({
    frozen: chosen.mp && chosen.lora, trainable: chosen.mp, optimizer: !chosen.lora, rank: chosen.lora, steps: chosen.ga,
  })) $(id).disabled = !used;
  history.replaceState(null, "", `#${fragment(chosen)}`);
  $("copied").textContent = "";
  let card, found;
  try {
    card = cardOf(chosen);
    found = plan(chosen, card);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    $("verdict").textContent = error.message;
    $("verdict").className = "off";
    for (const id of ["detail", "bar", "timeline", "tensors", "advice", "combinations", "all_cards", "command"]) $(id).replaceChildren();
    return;
  }
  const name = chosen.card === "custom" ? `${number(card.memory_mib)} MiB` : chosen.card;
  const words = { fits: `Fits ${name}`, tight: `Just fits ${name}`, "does not fit": `Does not fit ${name}` }[verdict(found)];
  const amount = found.fits ? `${number(found.room)} MiB to spare` : `${number(-found.room)} MiB short`;
  $("verdict").textContent = `${words}: ${amount}`;
  $("verdict").className = rowKind(found);
  const speed = found.tokensPerSecond === null ? "" : `; at best ${number(found.tokensPerSecond)} tokens/s`;
  const each = Number(chosen.cards) > 1 ? " on each card" : "", idle = found.idle ? ` ${found.idle} of the cards have no sample: choose a larger micro-batch.` : "";
  const phase = found.memory.phase.replace(/(forward|backward)/, "$1 pass"), reserved = found.memory.reserved;
  $("detail").textContent =
    `Needs ${number(found.needed)} of ${number(card.memory_mib)} MiB${each}: PyTorch reserves ${number(mib(reserved))} MiB (${number(reserved / GIGA, 2)} GB)` +
    ` for at most ${number(found.peak)} MiB of tensors, in the ${phase}, and the CUDA context takes ${chosen.card === "custom" ? "about " : ""}${number(card.context_mib)} MiB${speed}.${idle}`;
  showBar(found);
  showTimeline(found);
  showTensors(found);
  $("command").textContent = command(chosen);
  $("last_one").hidden = found.steps < 2;
  answerMore(chosen, card);
}

async function copy(text, said) {
  try {
    await navigator.clipboard.writeText(text);
    $("copied").textContent = said;
  } catch (error) {
    $("copied").textContent = "The browser does not allow copying: select the text instead.";
  }
}

async function start() {
  if (!window.DecompressionStream) {
    $("verdict").textContent = "This browser is too old: the page needs one of 2023 or newer.";
    return;
  }
  const packed = Uint8Array.from(atob($("data").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  DATA = await new Response(stream).json();
  const linked = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  show(DEFAULTS);
  showSizes(DEFAULTS.model);
  show({ model: linked.model || DEFAULTS.model });
  showSizes($("model").value);
  show(linked);
  $("choices").addEventListener("submit", (event) => event.preventDefault());
  $("choices").addEventListener("input", ({ target }) => {
    if (target.id === "model") showSizes(target.value);
    else if (SIZES.includes(target.id) || STRUCTURE.includes(target.id)) $("model").value = "custom";
    if ($("model").value === "custom") $("sizes").open = true;
    answer();
  });
  window.addEventListener("hashchange", () => location.reload());
  $("copy").addEventListener("click", () => copy($("command").textContent, "Copied."));
  $("link").addEventListener("click", () => copy(location.href, "Copied."));
  answer();
}

start();
