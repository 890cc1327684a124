// The page's controls, and the plan of what is chosen; replay.js computes.

const $ = (id) => document.getElementById(id);
const STRUCTURE = ["tied", "biases", "norms"]; // as FEATURES in planning/variants.py
const SIZES = ["n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_seq_len"];
const TECHNIQUES = ["ga", "mp", "lora", "gc"]; // in the order of a combination's name
const LABELS = { ga: "GA", mp: "MP", lora: "LoRA", gc: "GC" };
const DEFAULTS = {
  ga: false, mp: true, lora: true, gc: false, frozen: "compute", trainable: "fp32", optimizer: "adamw", rank: "16",
  steps: "8", length: "512", micro_batch: "1", packing: "", cards: "1", memory: "24000", program: "llama_ft", ...FIRST,
};
const LARGEST = 2 ** 24; // of a number that has no other limit
const USUAL_CONTEXT_MIB = 500; // of a card that is not in the list
const number = (value, digits = 0) => value.toLocaleString("en-US", { maximumFractionDigits: digits });
const mib = (bytes) => bytes / MIB;

// ---------------------------------------------------------------------------------------------- the choices

// The values of all controls, with sizes of the model only if they are not a named one's.
function choices() {
  const found = {};
  for (const control of document.querySelectorAll("#choices input, #choices select")) {
    found[control.id] = control.type === "checkbox" ? control.checked : control.value.trim();
  }
  return found;
}

function show(chosen) {
  for (const [id, value] of Object.entries(chosen)) {
    const control = $(id);
    if (!control) continue;
    if (control.type === "checkbox") control.checked = [true, "true", "1"].includes(value);
    else if (control.tagName !== "SELECT" || [...control.options].some((option) => option.value === value)) control.value = value;
  }
}

function showSizes(name) {
  const model = DATA.models[name];
  if (!model) return;
  for (const key of SIZES) $(key).value = model[key];
  STRUCTURE.forEach((id, n) => ($(id).checked = model.structure[1 + n] === "1"));
}

// What a link has to keep: model, card, and what differs from the page's first choices.
function fragment(chosen) {
  const isCustom = chosen.model === "custom";
  const parts = Object.entries(chosen).filter(([id, value]) => {
    if (id === "model" || id === "card") return true;
    if (SIZES.includes(id) || STRUCTURE.includes(id)) return isCustom;
    return id === "memory" ? chosen.card === "custom" : String(value) !== String(DEFAULTS[id]);
  });
  return new URLSearchParams(parts.map(([id, value]) => [id, String(value)])).toString();
}

// ---------------------------------------------------------------------------------------------- one plan

class Refused extends Error {}

function whole(chosen, id, most = LARGEST, least = 1, about = "") {
  const value = Number(chosen[id]);
  if (!Number.isInteger(value) || value < least || value > most) {
    const label = $(id).closest("label").textContent.trim();
    throw new Refused(`${label}: give a whole number from ${least} to ${number(most)}${about}`);
  }
  return value;
}

// The model's sizes, checked.
function modelOf(chosen) {
  if (chosen.model !== "custom") return DATA.models[chosen.model];
  const model = Object.fromEntries(SIZES.map((key) => [key, whole(chosen, key, key === "n_layers" ? 4096 : LARGEST)]));
  if (model.n_layers < DATA.depth) throw new Refused(`Layers: give at least ${DATA.depth}`);
  if (model.n_heads % model.n_kv_heads) throw new Refused("Key and value heads: give a divisor of the attention heads");
  if (model.head_dim % 32 || model.head_dim > 128) throw new Refused("Width of a head: this page plans 32, 64, 96 and 128; llama-ft plan takes others");
  return { ...model, structure: [model.n_kv_heads < model.n_heads, ...STRUCTURE.map((id) => chosen[id])].map(Number).join("") };
}

function cardOf(chosen) {
  if (chosen.card !== "custom") return DATA.cards[chosen.card];
  return { memory_mib: whole(chosen, "memory"), context_mib: USUAL_CONTEXT_MIB, has_bf16: true, workspace: DATA.workspace, tflops: {} };
}

// The trace for these choices on a card, and the sizes to replay it with; a `Refused` says why there is none.
function setUp(chosen, card) {
  const model = modelOf(chosen), layers = model.n_layers;
  const length = whole(chosen, "length", model.max_seq_len, 2, ", the model's context"), samples = whole(chosen, "micro_batch", 4096);
  const processes = whole(chosen, "cards", 64), rank = chosen.lora ? whole(chosen, "rank", 65536) : 1;
  const split = [model.dim, model.ffn_dim, model.vocab_size, model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim];
  if (split.some((rows) => rows % processes)) {
    throw new Refused(`${processes} cards cannot share this model's weights evenly: such runs are planned by llama-ft plan alone`);
  }
  const together = samples * (chosen.ga ? whole(chosen, "steps", 65536) : 1), isPacked = chosen.packing !== "";
  const tokens = length - 1; // the last one has nothing to predict
  if (isPacked && !(chosen.mp && card.has_bf16)) {
    throw new Refused("Packing is planned here for mixed precision on cards with bf16, where FlashAttention takes packed rows");
  }
  const share = Math.ceil(together / processes); // of an update's samples
  const room = isPacked ? Math.floor(whole(chosen, "packing") / tokens) : samples;
  const inRow = Math.max(1, Math.min(share, room)), steps = Math.ceil(share / inRow);
  const on = { ...Object.fromEntries(TECHNIQUES.map((name) => [name, chosen[name]])), ga: steps > 1 };
  const combination = TECHNIQUES.filter((name) => on[name]).join("_") || "baseline";
  const frozen = on.mp && on.lora ? chosen.frozen : "compute", trainable = on.mp ? chosen.trainable : "fp32";
  const optimizer = on.lora ? "adamw" : chosen.optimizer;
  if (optimizer !== "adamw" && processes > 1) throw new Refused("FSDP cannot cut the blocks of 8-bit moments: choose AdamW");
  if (trainable === "compute" && !card.has_bf16) throw new Refused("Trainable weights in 16 bit need bf16, which this card lacks");
  if (chosen.program === "other" && !card.has_bf16) throw new Refused("Another program's run is planned for cards with bf16");
  if (chosen.program === "other" && (processes > 1 || isPacked || optimizer !== "adamw")) {
    throw new Refused("Another program's run is planned on one card, without packing, with AdamW");
  }
  if (chosen.program === "other" && model.structure.slice(2) !== "00") {
    throw new Refused("Another program's run is planned for LLaMA's own structure, without biases and norms of queries and keys");
  }
  const flags = [card.has_bf16 || !on.mp, processes > 1, isPacked].map(Number).join("");
  const trace = DATA.traces[[model.structure + flags, combination, frozen, trainable, optimizer, chosen.program].join(" ")];
  if (!trace) throw new Refused("This kind of model is not on this page: llama-ft plan has it");
  const of = {
    dim: model.dim, ffn: model.ffn_dim, vocab: model.vocab_size, heads: model.n_heads, kv_heads: model.n_kv_heads,
    head_dim: model.head_dim, rank, context: model.max_seq_len, samples: inRow, tokens, targets: tokens,
    rows: isPacked ? tokens + 128 : Math.ceil(tokens / 128) * 128, processes, layers,
  };
  const sizesOf = (row) => DATA.symbols.map((name) => (name === "samples" ? row : of[name]));
  return { trace, sizes: sizesOf(inRow), last: sizesOf(share - inRow * (steps - 1)), layers, steps, stepTokens: together * length, idle: Math.max(0, processes - together) };
}

// What a run needs on a card, in bytes and seconds.
function plan(chosen, card) {
  const run = setUp(chosen, card);
  const memory = replay(run.trace, run.sizes, run.layers, card.workspace, chosen.program === "other");
  const seconds = stepSeconds(run.trace, run.sizes, run.last, run.layers, card, run.steps);
  const needed = mib(memory.reserved) + card.context_mib, room = card.memory_mib - needed;
  return {
    ...run, memory, needed, room, card,
    fits: room >= 0, hasRoom: room >= DATA.spare * (card.memory_mib - card.context_mib),
    peak: mib(memory.peak + rounded(card.workspace)),
    tokensPerSecond: seconds === null ? null : run.stepTokens / seconds,
  };
}

function attempt(chosen, card) {
  try {
    return plan(chosen, card);
  } catch (error) {
    if (error instanceof Refused) return { refused: error.message };
    throw error;
  }
}
