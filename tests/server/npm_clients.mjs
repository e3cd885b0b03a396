// The npm clients of both companies, unchanged, against a server that runs:
//
//     node npm_clients.mjs FOLDER URL MODEL
//
// FOLDER has the packages openai and @anthropic-ai/sdk in its node_modules. Ends with one line of JSON: the packages'
// versions, and what was done.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [folder, url, model] = process.argv.slice(2);
const require = createRequire(join(folder, "clients.js"));
const { default: OpenAI, NotFoundError } = require("openai");
const { default: Anthropic, BadRequestError } = require("@anthropic-ai/sdk");
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const anthropic = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });

const schema = {
  type: "object",
  properties: { city: { enum: ["Oslo", "Rome"] }, days: { type: "integer", minimum: 1, maximum: 9 } },
  required: ["city", "days"],
  additionalProperties: false,
};
const messages = [{ role: "user", content: "Hi!" }];
const done = [];

function checkCall(name, args) {
  assert.equal(name, "weather");
  assert.ok(["Oslo", "Rome"].includes(args.city));
  assert.ok(Number.isInteger(args.days) && args.days >= 1 && args.days <= 9);
}

async function step(name, run) {
  await run();
  done.push(name);
}

await step("chat", async () => {
  const answer = await openai.chat.completions.create({ model, messages, max_tokens: 5, temperature: 0 });
  assert.equal(answer.choices[0].message.role, "assistant");
  assert.ok(answer.usage.completion_tokens <= 5);
});

await step("chat, streamed", async () => {
  const asked = { model, messages, max_tokens: 20, temperature: 0 };
  const whole = await openai.chat.completions.create(asked);
  const stream = openai.chat.completions.stream({ ...asked, stream_options: { include_usage: true } });
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
  const final = await stream.finalChatCompletion();
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(final.choices[0].message.content, text);
  assert.equal(final.usage.completion_tokens, whole.usage.completion_tokens);
});

await step("chat, tools", async () => {
  const tools = [{ type: "function", function: { name: "weather", parameters: schema } }];
  const asked = { model, messages, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 700 };
  const answer = await openai.chat.completions.create(asked);
  const [call] = answer.choices[0].message.tool_calls;
  checkCall(call.function.name, JSON.parse(call.function.arguments));
  const result = { role: "tool", tool_call_id: call.id, content: "wet" };
  const history = [...messages, answer.choices[0].message, result];
  const stream = openai.chat.completions.stream({ ...asked, messages: history });
  const final = await stream.finalChatCompletion();
  const again = final.choices[0].message.tool_calls[0];
  checkCall(again.function.name, JSON.parse(again.function.arguments));
  assert.equal(final.choices[0].finish_reason, "tool_calls");
});

await step("chat, parsed", async () => {
  const form = { type: "json_schema", json_schema: { name: "x", schema: { enum: ["a", "b"] }, strict: true } };
  const answer = await openai.chat.completions.parse({ model, messages, response_format: form, max_tokens: 50 });
  assert.ok(["a", "b"].includes(answer.choices[0].message.parsed));
});

await step("responses", async () => {
  const tools = [{ type: "function", name: "weather", parameters: schema, strict: true }];
  const asked = { model, input: "Hi!", tools, tool_choice: "required", max_output_tokens: 700 };
  const first = await openai.responses.create(asked);
  const call = first.output[0];
  checkCall(call.name, JSON.parse(call.arguments));
  const output = { type: "function_call_output", call_id: call.call_id, output: "wet" };
  const second = await openai.responses.create({
    model,
    previous_response_id: first.id,
    input: [output],
    max_output_tokens: 3,
  });
  assert.ok(second.usage.output_tokens <= 3);
  assert.deepEqual((await openai.responses.retrieve(first.id)).output, first.output);
  await openai.responses.delete(first.id);
  await assert.rejects(openai.responses.retrieve(first.id), NotFoundError);
});

await step("responses, streamed", async () => {
  const stream = openai.responses.stream({ model, input: "Hi!", max_output_tokens: 20, temperature: 0 });
  let text = "";
  for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
  assert.equal((await stream.finalResponse()).output_text, text);
});

await step("messages", async () => {
  const answer = await anthropic.messages.create({ model, messages, system: "Be brief.", max_tokens: 5 });
  assert.equal(answer.role, "assistant");
  const stream = anthropic.messages.stream({ model, messages, max_tokens: 20 });
  let text = "";
  stream.on("text", (delta) => (text += delta));
  assert.equal((await stream.finalText()) ?? "", text);
});

await step("messages, tools", async () => {
  const tools = [{ name: "weather", input_schema: schema }];
  const choice = { type: "any", disable_parallel_tool_use: true };
  const asked = { model, messages, tools, tool_choice: choice, max_tokens: 700 };
  const first = await anthropic.messages.stream(asked).finalMessage();
  const block = first.content.find((one) => one.type === "tool_use");
  checkCall(block.name, block.input);
  const result = { role: "user", content: [{ type: "tool_result", tool_use_id: block.id, content: "wet" }] };
  const history = [...messages, { role: "assistant", content: first.content }, result];
  const second = await anthropic.messages.create({ model, messages: history, tools, max_tokens: 3 });
  assert.ok(second.usage.output_tokens <= 3);
});

await step("messages, counted and refused", async () => {
  const counted = await anthropic.messages.countTokens({ model, messages });
  assert.ok(counted.input_tokens > 3);
  await assert.rejects(anthropic.messages.create({ model, messages, max_tokens: 3, top_k: -5 }), BadRequestError);
});

const versions = Object.fromEntries(
  ["openai", "@anthropic-ai/sdk"].map((name) => [
    name,
    JSON.parse(readFileSync(join(folder, "node_modules", name, "package.json"))).version,
  ]),
);
console.log(JSON.stringify({ node: process.version, ...versions, done }));
