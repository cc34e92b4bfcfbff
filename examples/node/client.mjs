// Text from Node.js, token by token. Needs `npm ci`, and nothing of WiCore.
//
//   export REDIS_URL=redis://127.0.0.1:6379/0
//   node client.mjs "Once upon a time" 40      prints the job's id, then its text
//   node client.mjs --resume JOB 12            the text after event 12

import { randomUUID } from "node:crypto";
import { once } from "node:events";
import { Redis } from "ioredis";

const QUEUES = { interactive: "wicore", normal: "wicore\x06\x163", batch: "wicore\x06\x166" };
const LAST = new Set(["done", "failed", "cancelled", "expired"]);

/** Push a job; resolves to its id. Pushing the same message twice runs it once. */
async function submit(redis, body, level = "normal") {
  const job = randomUUID();
  const message = {
    headers: { task: "wicore.generate", id: job, expires: null },
    properties: { delivery_tag: randomUUID() },
    "content-type": "application/json",
    "content-encoding": "utf-8",
    body: JSON.stringify([[], body, {}]),
  };
  await redis.lpush(QUEUES[level], JSON.stringify(message));
  return job;
}

/** Every event numbered over `after`, once and in order, to the last one. */
async function* follow(redis, job, after = 0) {
  const channel = redis.duplicate();
  let heard = [];
  channel.on("message", (_, text) => heard.push(JSON.parse(text)));
  await channel.subscribe(`wicore:events:${job}`); // confirmed: from here on nothing new is missed
  try {
    for (;;) {
      let events = heard.filter((event) => event.seq > after);
      heard = [];
      if (events.length === 0 || events.at(-1).seq > after + events.length) {
        events = await recorded(redis, job, after); // at the start, after a gap, after a silence
      }
      for (const event of events) {
        after = event.seq;
        yield event;
        if (LAST.has(event.type)) return;
      }
      if (heard.length === 0) await wait(channel, 1000);
    }
  } finally {
    channel.disconnect();
  }
}

async function recorded(redis, job, after) {
  const entries = await redis.xrange(`wicore:log:${job}`, `(0-${after}`, "+");
  return entries.map(([, [, event]]) => JSON.parse(event));
}

/** Until the next message, or `ms` of silence. */
async function wait(channel, ms) {
  await once(channel, "message", { signal: AbortSignal.timeout(ms) }).catch(() => {});
}

/** The answer in OpenAI's form, once the last event has come. */
async function result(redis, job) {
  const outcome = JSON.parse(await redis.get(`celery-task-meta-${job}`));
  if (outcome.status !== "SUCCESS") throw new Error(outcome.result.exc_message);
  return outcome.result;
}

const redis = new Redis(process.env.REDIS_URL ?? "redis://127.0.0.1:6379/0");
let [, , job, after] = process.argv;
if (job === "--resume") {
  [job, after] = [process.argv[3], Number(process.argv[4])];
} else {
  const body = { kind: "completion", prompt: job, max_tokens: Number(after), temperature: 0 };
  [job, after] = [await submit(redis, body), 0];
  console.error(job);
}
for await (const event of follow(redis, job, after)) {
  if (event.type === "token") process.stdout.write(event.text);
}
process.stdout.write("\n");
console.error(JSON.stringify((await result(redis, job)).usage));
redis.disconnect();
