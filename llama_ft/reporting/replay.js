// Replays the traces of llama_ft/planning for any sizes: memory over a run, what the allocator reserves, time at best.
"use strict";

const MIB = 2 ** 20, GIGA = 1e9, TERA = 1e12;
const SMALL_SIZE = MIB, SMALL_PAGE = 2 * MIB, LARGE_PAGE = 20 * MIB, ROUNDING = 512; // as in planning/allocator.py
const LARGE_REQUEST = 10 * MIB; // from here on a segment of its own, without expandable ones
let DATA; // see `page_data` in will_it_fit.py
const MAX_POINTS = 200; // of a timeline

const rounded = (bytes) => Math.ceil(bytes / ROUNDING) * ROUNDING;

// The value of a formula, a sum of terms: each a factor and the powers of DATA.symbols.
function valueOf(formula, sizes) {
  let sum = 0;
  for (const term of formula) {
    let product = term[0];
    for (let i = 1; i < term.length; i++) if (term[i]) product *= sizes[i - 1] ** term[i];
    sum += product;
  }
  return sum;
}

// A range of addresses of PyTorch's allocator, as `Pool` in planning/allocator.py.
class Pool {
  constructor(page) {
    this.page = page;
    this.reserved = 0;
    this.free = []; // [size, start], sorted
    this.starts = new Map(); // of free blocks, start to size
    this.ends = new Map(); // of free blocks, end to start
  }

  index(size, start) {
    let low = 0, high = this.free.length;
    while (low < high) {
      const middle = (low + high) >> 1, [s, at] = this.free[middle];
      if (s < size || (s === size && at < start)) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  allocate(size) {
    let index = this.index(size, -1);
    if (index === this.free.length) {
      const last = this.ends.has(this.reserved) ? this.ends.get(this.reserved) : this.reserved;
      const more = Math.ceil((size - (this.reserved - last)) / this.page) * this.page;
      this.reserved += more;
      this.release(this.reserved - more, more);
      index = this.index(size, -1);
    }
    if (this.free[index][0] + this.free[index][1] === this.reserved && index + 1 < this.free.length) index++;
    const [length, start] = this.free[index];
    this.remove(start, length);
    if (length > size) this.add(start + size, length - size);
    return start;
  }

  release(start, size) {
    const before = this.ends.get(start);
    if (before !== undefined) {
      const length = this.starts.get(before);
      this.remove(before, length);
      start = before;
      size += length;
    }
    const after = this.starts.get(start + size);
    if (after !== undefined) {
      this.remove(start + size, after);
      size += after;
    }
    this.add(start, size);
  }

  add(start, size) {
    this.free.splice(this.index(size, start), 0, [size, start]);
    this.starts.set(start, size);
    this.ends.set(start + size, start);
  }

  remove(start, size) {
    this.free.splice(this.index(size, start), 1);
    this.starts.delete(start);
    this.ends.delete(start + size);
  }
}

// The allocator without expandable segments, as in benchmarks/native_allocator.py: for other programs, whose default it is.
class Segments extends Pool {
  constructor(isSmall) {
    super();
    this.isSmall = isSmall;
    this.next = 0;
    this.taken = new Map(); // of blocks in use, start to size, which may be more than was asked for
  }

  allocate(size) {
    let index = this.index(size, -1);
    if (index === this.free.length) {
      const segment = this.isSmall ? SMALL_PAGE : size < LARGE_REQUEST ? LARGE_PAGE : Math.ceil(size / SMALL_PAGE) * SMALL_PAGE;
      this.add(this.next, segment);
      this.next += segment + 1; // not next to another
      this.reserved += segment;
      index = this.index(size, -1);
    }
    const [length, start] = this.free[index];
    this.remove(start, length);
    const keeps = length - size >= (this.isSmall ? ROUNDING : SMALL_SIZE + 1);
    if (keeps) this.add(start + size, length - size);
    this.taken.set(start, keeps ? size : length);
    return start;
  }

  release(start, size) {
    super.release(start, this.taken.get(start));
  }
}

// A trace's events for a number of layers: [phase, event numbers] for each section.
function unrolled(trace, layers) {
  return trace.sections.map(([phase, ...parts]) => {
    const [once, layer] = parts.map((id) => DATA.lists[id]);
    const events = new Int32Array(once.length + layer.length * (layers - DATA.depth));
    events.set(once);
    for (let n = 0; n < layers - DATA.depth; n++) events.set(layer, once.length + n * layer.length);
    return [phase, events];
  });
}

const kindOf = (event) => (Math.abs(event) - 1) % DATA.places; // see PLACES in planning/trace.py

// Memory of a run, in bytes: the peak, what is alive then by kind, and what the allocator reserves.
function replay(trace, sizes, layers, workspace, isNative = false) {
  const kinds = trace.kinds.map((id) => DATA.kinds[id]);
  const bytes = kinds.map(([formula]) => rounded(valueOf(DATA.formulas[formula], sizes)));
  const sections = unrolled(trace, layers);
  const [small, large] = isNative ? [new Segments(true), new Segments(false)] : [new Pool(SMALL_PAGE), new Pool(LARGE_PAGE)];
  if (workspace) large.allocate(rounded(workspace));
  const live = kinds.map(() => []);
  let alive = 0, peak = 0, peakAt = [0, 0];
  sections.forEach(([, events], section) => {
    for (let n = 0; n < events.length; n++) {
      const kind = kindOf(events[n]), size = bytes[kind], pool = size <= SMALL_SIZE ? small : large;
      if (events[n] > 0) {
        live[kind].push(pool.allocate(size));
        alive += size;
        if (alive > peak) {
          peak = alive;
          peakAt = [section, n];
        }
      } else {
        const place = Math.floor((-events[n] - 1) / DATA.places), half = place >> 1;
        const index = place % 2 ? half : live[kind].length - 1 - half;
        pool.release(live[kind].splice(index, 1)[0], size);
        alive -= size;
      }
    }
  });
  return { kinds, bytes, sections, peak, peakAt, reserved: small.reserved + large.reserved, phase: sections[peakAt[0]][0] };
}

// How many storages of each kind are alive at the peak of a replay.
function atPeak({ kinds, sections, peakAt: [section, n] }) {
  const counts = new Int32Array(kinds.length);
  for (let s = 0; s <= section; s++) {
    const events = sections[s][1], end = s === section ? n + 1 : events.length;
    for (let i = 0; i < end; i++) counts[kindOf(events[i])] += Math.sign(events[i]);
  }
  return counts;
}

// Bytes by category over the last step: [phase, {category: bytes}] for each point, the highest of a few events.
function timeline({ kinds, bytes, sections }) {
  let first = sections.map(([phase]) => phase).lastIndexOf("forward");
  while (first > 0 && sections[first - 1][0] === "forward") first--;
  const now = Object.fromEntries(DATA.categories.map((name) => [name, 0]));
  let total = 0;
  const apply = (event) => {
    const kind = kindOf(event), change = Math.sign(event) * bytes[kind];
    now[kinds[kind][1]] += change;
    total += change;
  };
  for (const [, events] of sections.slice(0, first)) events.forEach(apply);
  const step = sections.slice(first).filter(([phase]) => phase !== "after the step");
  const count = step.reduce((sum, [, events]) => sum + events.length, 0), width = Math.max(1, Math.ceil(count / MAX_POINTS));
  const points = [];
  for (const [phase, events] of step) {
    let highest = -1;
    events.forEach((event, n) => {
      apply(event);
      if (n % width === 0) {
        points.push([phase, { ...now }]);
        highest = total;
      } else if (total > highest) {
        points[points.length - 1][1] = { ...now };
        highest = total;
      }
    });
  }
  points.push(["optimizer step", { ...now }]);
  return points;
}

// Seconds of a part of a step, by the resource that binds, as `bound_by_resource` in planning/operators.py.
function secondsOf(costs, sizes, layers, card) {
  const tokens = sizes[DATA.symbols.indexOf("tokens")], processes = sizes[DATA.symbols.indexOf("processes")];
  const seconds = { memory: 0 };
  for (const [dtype, flopsId, bytesId, fixed, perLayer] of costs) {
    const count = fixed + perLayer * layers, bytes = valueOf(DATA.formulas[bytesId], sizes);
    if (dtype === DATA.link) {
      if (!card.link_gb_s) return null;
      const sent = (bytes * (processes - 1)) / processes;
      seconds[dtype] = (seconds[dtype] || 0) + (count * sent) / (card.link_gb_s * GIGA);
      continue;
    }
    let resource = "memory", needed = bytes / (card.bandwidth_gb_s * GIGA);
    const formula = DATA.formulas[flopsId];
    if (formula.length) {
      const rate = card.tflops[DATA.rates[dtype]];
      if (!rate) return null;
      const isAttention = formula[0][1 + DATA.symbols.indexOf("tokens")] > 1;
      const computing = (valueOf(formula, sizes) * (isAttention ? (tokens + 1) / (2 * tokens) : 1)) / (rate * TERA);
      if (computing > needed) [resource, needed] = [dtype, computing];
    }
    seconds[resource] = (seconds[resource] || 0) + count * needed;
  }
  return seconds;
}

// The least seconds of an optimizer step with `steps` micro-batches, the last of other sizes; null if a rate is not known.
function stepSeconds(trace, sizes, last, layers, card, steps) {
  if (!card.bandwidth_gb_s) return null;
  const [microBatch, accumulated, update] = trace.costs, sum = {};
  for (const [costs, at, times] of [[microBatch, sizes, steps - 1], [microBatch, last, 1], [accumulated, sizes, steps - 1], [update, sizes, 1]]) {
    const seconds = secondsOf(costs, at, layers, card);
    if (seconds === null) return null;
    for (const [name, s] of Object.entries(seconds)) sum[name] = (sum[name] || 0) + times * s;
  }
  const link = sum[DATA.link] || 0;
  delete sum[DATA.link];
  return Math.max(Object.values(sum).reduce((a, b) => a + b), link);
}
