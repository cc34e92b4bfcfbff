/** Rates out of the counters that heartbeats tell. Knows no page and no clock: times come in heartbeats. */

const HIT_WINDOW = 30; // heartbeats, of which one comes a second
const JOB_WINDOW = 10; // ended jobs are few: by the second they would make a row of spikes
const CALLED_OFF = ["cancelled", "expired"];
const DEPTH = ["device", "host", "nvme"]; // tiers, from the nearest to the engine

/** What counts up in a heartbeat, and over how many heartbeats its rate is taken. */
const COUNTERS = {
  generated: [1, (beat) => beat.requests?.generation_tokens],
  prompt: [1, (beat) => beat.requests?.prompt_tokens],
  succeeded: [JOB_WINDOW, (beat) => finished(beat, (reason) => !["failed", ...CALLED_OFF].includes(reason))],
  failed: [JOB_WINDOW, (beat) => finished(beat, (reason) => reason === "failed")],
  called_off: [JOB_WINDOW, (beat) => finished(beat, (reason) => CALLED_OFF.includes(reason))],
  raised: [1, (beat) => moved(beat, (from, to) => from > to)],
  demoted: [1, (beat) => moved(beat, (from, to) => from < to)],
};

export class Rates {
  #workers = new Map(); // heartbeats by worker, the last one last

  /**
   * Take a `/status` in. Returns what happens a second, all workers together, under the names of COUNTERS;
   * hit_rate, the share of prompt tokens found in the cache lately, null when none was looked for; and
   * `speeds`, tokens a second by worker.
   */
  take(status) {
    const workers = new Map();
    for (const beat of status.workers) {
      const beats = this.#workers.get(beat.id) ?? [];
      workers.set(
        beat.id,
        beats.at(-1)?.at_ms === beat.at_ms ? beats : [...beats, beat].slice(-HIT_WINDOW - 1),
      );
    }
    this.#workers = workers;
    const all = [...workers.values()];
    const rates = Object.entries(COUNTERS).map(([name, counter]) => [
      name,
      add(all.map((beats) => rate(beats, ...counter))),
    ]);
    const found = add(
      all.map((beats) => growth(beats, HIT_WINDOW, (beat) => add(Object.values(beat.kv?.hit_tokens ?? {})))),
    );
    const sought = add(all.map((beats) => growth(beats, HIT_WINDOW, (beat) => beat.kv?.opened_tokens)));
    return {
      ...Object.fromEntries(rates),
      hit_rate: sought > 0 ? found / sought : null,
      speeds: new Map([...workers].map(([id, beats]) => [id, rate(beats, ...COUNTERS.generated)])),
    };
  }
}

/** Jobs that ended for one of the reasons wanted. */
function finished(beat, wanted) {
  const counts = Object.entries(beat.requests?.finished ?? {});
  return add(counts.filter(([reason]) => wanted(reason)).map(([, count]) => count));
}

const earlier = (beats, window) => beats[Math.max(0, beats.length - 1 - window)];

/** By how much a counter, which not every worker need have, grew over the last so many heartbeats. */
function growth(beats, window, counter) {
  return (counter(beats.at(-1)) ?? 0) - (counter(earlier(beats, window)) ?? 0);
}

function rate(beats, window, counter) {
  const seconds = (beats.at(-1).at_ms - earlier(beats, window).at_ms) / 1000;
  return seconds > 0 ? growth(beats, window, counter) / seconds : 0;
}

/** Bytes moved along the ways, `source>target`, that `wanted` takes. */
function moved(beat, wanted) {
  return add(
    Object.entries(beat.kv?.moved_bytes ?? {})
      .filter(([way]) => wanted(...way.split(">").map((tier) => DEPTH.indexOf(tier))))
      .flatMap(([, pools]) => Object.values(pools)),
  );
}

const add = (numbers) => numbers.reduce((total, number) => total + number, 0);
