// The AI SDK against a server that runs: npm install --prefix scripts/ai_sdk && node scripts/ai_sdk/check.mjs [URL]
// Three providers, each with text, streams, tools in a loop, objects of a schema; then embeddings and an error.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embedMany, generateObject, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = process.argv[2] ?? "http://127.0.0.1:8000/v1";
const { data } = await (await fetch(`${baseURL}/models`)).json();
const name = data[0].id;
const compatible = createOpenAICompatible({
  name: "pelton",
  baseURL,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL, apiKey: "none" });
const models = {
  "openai-compatible": compatible(name),
  "openai.chat": openai.chat(name),
  "openai.responses": openai.responses(name),
};

const shape = z.object({ city: z.string(), population: z.number().int() });
const asked = [];
const tools = {
  get_weather: tool({
    description: "The weather in a city.",
    inputSchema: z.object({ city: z.string() }),
    execute: ({ city }) => {
      asked.push(city);
      return { city, celsius: 21 };
    },
  }),
};
const settings = { temperature: 0, maxRetries: 0 };

const checks = {
  async "generateText"(model) {
    const { text, usage, finishReason } = await generateText({
      ...settings, model, system: "Be brief.", prompt: "Name a color.", maxOutputTokens: 20,
    });
    assert.ok(text.length > 0 && usage.inputTokens > 0 && usage.outputTokens > 0);
    assert.ok(["stop", "length"].includes(finishReason));
  },
  async "streamText"(model) {
    const options = { ...settings, model, prompt: "Count from one to five.", maxOutputTokens: 40 };
    const stream = streamText(options);
    const parts = [];
    for await (const part of stream.textStream) parts.push(part);
    assert.ok(parts.length > 1);
    assert.equal(parts.join(""), (await generateText(options)).text);
    assert.ok((await stream.usage).outputTokens > 1);
  },
  async "tools, required, then an answer"(model) {
    asked.length = 0;
    const result = await generateText({
      ...settings, model, tools, prompt: "What is the weather in Oslo?", maxOutputTokens: 60,
      stopWhen: stepCountIs(2),
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
    });
    assert.equal(asked.length, 1);
    assert.equal(result.steps.length, 2);
    assert.equal(result.steps[0].finishReason, "tool-calls");
    assert.equal(result.steps[0].toolResults[0].output.celsius, 21);
    assert.ok(result.text.length > 0);
  },
  async "a named tool, streamed"(model) {
    const stream = streamText({
      ...settings, model, tools, prompt: "Weather in Rome?", maxOutputTokens: 60,
      toolChoice: { type: "tool", toolName: "get_weather" },
    });
    const calls = await stream.toolCalls;
    assert.equal(calls.length, 1);
    assert.equal(typeof calls[0].input.city, "string");
  },
  async "generateObject"(model) {
    const { object } = await generateObject({
      ...settings, model, schema: shape, prompt: "Oslo and how many live there.", maxOutputTokens: 80,
    });
    shape.parse(object);
  },
  async "streamText with an object"(model) {
    const stream = streamText({
      ...settings, model, output: Output.object({ schema: shape }), prompt: "Rome.", maxOutputTokens: 80,
    });
    for await (const _ of stream.partialOutputStream);
    shape.parse(await stream.output);
  },
  async "a conversation with what was called"(model) {
    const first = await generateText({
      ...settings, model, tools, toolChoice: "required", prompt: "Weather in Oslo?", maxOutputTokens: 60,
    });
    const messages = [{ role: "user", content: "Weather in Oslo?" }, ...first.response.messages];
    const next = await generateText({
      ...settings, model, messages: [...messages, { role: "user", content: "Thanks. Say bye." }], maxOutputTokens: 20,
    });
    assert.ok(next.text.length > 0);
  },
  async "an error is one"(model) {
    const call = generateText({ ...settings, model, prompt: "a ".repeat(100_000), maxOutputTokens: 5 });
    await assert.rejects(call, (error) => APICallError.isInstance(error) && error.statusCode === 400);
  },
};

let failed = 0;
async function check(title, run) {
  try {
    await run();
    console.log(`ok      ${title}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${title}: ${error.message}\n${error.responseBody ?? ""}`);
  }
}

for (const [provider, model] of Object.entries(models))
  for (const [title, run] of Object.entries(checks)) await check(`${provider}: ${title}`, () => run(model));
await check("embedMany", async () => {
  const { embeddings } = await embedMany({ model: openai.embedding(name), values: ["a cat", "a dog", "an engine"] });
  assert.equal(embeddings.length, 3);
  assert.ok(embeddings[0].length > 0);
});
console.log(failed ? `${failed} failed` : "all passed");
process.exit(failed ? 1 : 0);
