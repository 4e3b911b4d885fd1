// Latency from a change to its picture on screen, and pictures per second over the last seconds.

const KEPT = 100; // latencies
const WINDOW_MS = 3000;
const REFRESH_MS = 250; // a number that changes faster cannot be read

export class Meter {
  #latencies = [];
  #times = []; // when the pictures of the last seconds came
  #outputs;

  /** outputs: the elements {p50, p95, rate}. */
  constructor(outputs) {
    this.#outputs = outputs;
    setInterval(() => document.hidden || this.#write(), REFRESH_MS);
  }

  /** A picture whose input changed at `changedAt` has just been drawn; what counts is the frame that shows it. */
  picture(changedAt) {
    requestAnimationFrame(() => {
      const now = performance.now();
      this.#latencies.push(now - changedAt);
      if (this.#latencies.length > KEPT) this.#latencies.shift();
      this.#times.push(now);
    });
  }

  #write() {
    const { p50, p95, rate } = this.#outputs;
    p50.textContent = milliseconds(percentile(this.#latencies, 0.5));
    p95.textContent = milliseconds(percentile(this.#latencies, 0.95));
    const now = performance.now();
    this.#times = this.#times.filter((time) => now - time < WINDOW_MS);
    rate.textContent = (this.#times.length / (WINDOW_MS / 1000)).toFixed(1);
  }
}

/** The smallest value that at least `share` of them do not exceed; undefined if there are none. */
export function percentile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)];
}

function milliseconds(value) {
  if (value === undefined) return "–";
  return value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`;
}
