// The AI SDK with one provider: a stream, loops with two tools and structured output. Prints the results as JSON.
// Usage: node ai_sdk.mjs PROVIDER SERVER_URL MODEL
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [provider, server, name] = process.argv.slice(2);
const options = { baseURL: `${server}/v1`, apiKey: "none" };
const providers = {
  openai: () => createOpenAI(options),
  "openai-compatible": () => createOpenAICompatible({ ...options, name: "paceline", includeUsage: true, supportsStructuredOutputs: true }),
  anthropic: () => createAnthropic(options),
};
const base = { model: providers[provider]()(name), temperature: 0, maxRetries: 0 };

async function stream() {
  const result = streamText({ ...base, prompt: "Name three colors.", maxOutputTokens: 32 });
  const parts = [];
  for await (const part of result.fullStream) {
    if (part.type === "error") throw part.error;
    parts.push(part.type);
  }
  const usage = await result.usage;
  return { parts, text: await result.text, finish: await result.finishReason, usage };
}

function tools(called) {
  const City = z.object({ city: z.enum(["Bern", "Oslo"]) });
  const Numbers = z.object({ a: z.number().int(), b: z.number().int() });
  return {
    temperature: tool({
      description: "Returns the temperature of a city in degrees.",
      inputSchema: City,
      execute: (input) => (called.push(["temperature", input]), 7),
    }),
    add: tool({
      description: "Returns the sum of two numbers.",
      inputSchema: Numbers,
      execute: (input) => (called.push(["add", input]), { sum: input.a + input.b }),
    }),
  };
}

const QUESTION = "Call temperature for Bern. Then call add with that temperature and 2. Then say the sum.";

async function loop(run) {
  const called = [];
  const choices = [{ type: "tool", toolName: "temperature" }, { type: "tool", toolName: "add" }];
  const result = run({
    ...base,
    prompt: QUESTION,
    tools: tools(called),
    stopWhen: stepCountIs(5),
    maxOutputTokens: 128,
    prepareStep: ({ stepNumber }) => ({ toolChoice: choices[stepNumber] ?? "auto" }),
  });
  const done = await result;
  const steps = (await done.steps).map((step) => step.finishReason);
  return { called, steps, text: await done.text };
}

async function structured() {
  const schema = z.object({
    name: z.enum(["Bern", "Oslo"]),
    temperature: z.number().int().min(-40).max(50),
    tags: z.array(z.enum(["cold", "warm"])).max(2),
    note: z.string().max(20).optional(),
  });
  const prompt = "It is 7 degrees warm in Bern. Describe this in JSON.";
  const object = await generateObject({ ...base, schema, prompt, maxOutputTokens: 96 });
  const output = await generateText({ ...base, output: Output.object({ schema }), prompt, maxOutputTokens: 96 });
  return { object: object.object, output: output.output };
}

const drained = async (options) => {
  const result = streamText(options);
  await result.consumeStream({ onError: (error) => { throw error; } });
  return result;
};
const results = {
  stream: await stream(),
  loop: await loop(generateText),
  streamed_loop: await loop(drained),
  structured: await structured(),
};
console.log(JSON.stringify(results));
