// A tour with OpenAI's client for Node: `node openai_node.mjs URL MODEL`, where `openai` is installed.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

// The client lies where the tour is run, not beside this file.
const require = createRequire(pathToFileURL(path.join(process.cwd(), "index.js")));
const OpenAI = require("openai");

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const ask = [{ role: "user", content: "What is the weather in Paris?" }];
const parameters = {
  type: "object",
  properties: { place: { enum: ["Paris", "Rome"] } },
  required: ["place"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "get_weather", parameters, strict: true } }];

const dot = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC";

const chat = (asked = {}) =>
  client.chat.completions.create({ model, messages: ask, max_completion_tokens: 8, temperature: 0, ...asked });

const stops = {
  async models() {
    const [served] = (await client.models.list()).data;
    assert.equal(served.id, model);
    assert.deepEqual(await client.models.retrieve(model), served);
  },

  async aChatWholeAndStreamed() {
    const whole = await chat();
    let text = "";
    let usage;
    for await (const chunk of await chat({ stream: true, stream_options: { include_usage: true } })) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.total_tokens, whole.usage.total_tokens);
  },

  async anImage() {
    const content = [{ type: "image_url", image_url: { url: dot } }, { type: "text", text: "What is it?" }];
    const shown = await chat({ messages: [{ role: "user", content }] });
    assert.ok(shown.usage.prompt_tokens > 8);
  },

  async choicesLogprobsAndStop() {
    const asked = { n: 2, seed: 3, temperature: 1, logprobs: true, top_logprobs: 2, stop: ["###"] };
    const answer = await chat(asked);
    assert.equal(answer.choices.length, 2);
    assert.equal(answer.choices[1].logprobs.content[0].top_logprobs.length, 2);
  },

  async aSchema() {
    const json_schema = { name: "place", schema: parameters, strict: true };
    const answer = await chat({ max_completion_tokens: 40, response_format: { type: "json_schema", json_schema } });
    assert.ok(["Paris", "Rome"].includes(JSON.parse(answer.choices[0].message.content).place));
  },

  async aCallAndItsResult() {
    const asked = { tools, tool_choice: "required", parallel_tool_calls: false, max_completion_tokens: 60 };
    const { message, finish_reason } = (await chat(asked)).choices[0];
    assert.equal(finish_reason, "tool_calls");
    const [call] = message.tool_calls;
    const streamed = await client.chat.completions
      .stream({ model, messages: ask, temperature: 0, ...asked })
      .finalChatCompletion();
    assert.equal(streamed.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
    const result = { role: "tool", tool_call_id: call.id, content: "clear" };
    const after = await chat({ messages: [...ask, message, result], tools, tool_choice: "none" });
    assert.equal(after.choices[0].message.tool_calls, undefined);
  },

  async theClientRunsTheTools() {
    let called = 0;
    const runner = client.chat.completions.runTools(
      {
        model,
        messages: ask,
        tool_choice: { type: "function", function: { name: "get_weather" } },
        max_completion_tokens: 60,
        tools: [
          {
            type: "function",
            function: { name: "get_weather", parameters, parse: JSON.parse, function: () => `${++called}` },
          },
        ],
      },
      { maxChatCompletions: 2 },
    );
    await runner.done();
    assert.ok(called >= 1);
  },

  async completions() {
    const asked = { model, prompt: ["Once", "Upon"], n: 2, max_tokens: 4, seed: 1 };
    const whole = await client.completions.create(asked);
    const texts = ["", "", "", ""];
    for await (const chunk of await client.completions.create({ ...asked, stream: true })) {
      texts[chunk.choices[0].index] += chunk.choices[0].text;
    }
    assert.deepEqual(whole.choices.map((choice) => choice.text), texts);
  },

  async errors() {
    await assert.rejects(chat({ temperature: 3 }), (err) => {
      assert.ok(err instanceof OpenAI.BadRequestError);
      assert.equal(err.param, "temperature");
      return true;
    });
    await assert.rejects(client.models.retrieve("gpt-6"), OpenAI.NotFoundError);
  },
};

for (const [name, stop] of Object.entries(stops)) {
  console.log(name);
  await stop();
}
const { VERSION } = require("openai/version");
console.log(`openai for node ${VERSION}: ${Object.keys(stops).length} stops passed`);
