// OpenAI's SDK over chat completions and responses: streams, a loop with two tools and parsed output. Prints JSON.
// Usage: node openai_sdk.mjs SERVER_URL MODEL
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [server, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${server}/v1`, apiKey: "none", maxRetries: 0 });
const base = { model, temperature: 0 };
const City = z.object({ name: z.enum(["Bern", "Oslo"]), temperature: z.number().int() });
const MESSAGES = [{ role: "user", content: "It is 7 degrees warm in Bern. Describe this in JSON." }];

async function chatStream() {
  const stream = client.chat.completions.stream({
    ...base,
    messages: [{ role: "user", content: "Name three colors." }],
    max_tokens: 32,
    stream_options: { include_usage: true },
  });
  let deltas = "";
  stream.on("content", (delta) => (deltas += delta));
  const text = await stream.finalContent();
  return { deltas, text, tokens: (await stream.totalUsage()).completion_tokens };
}

async function toolLoop() {
  const called = [];
  const number = { type: "integer" };
  const definition = (name, properties, run) => ({
    type: "function",
    function: {
      name,
      description: `Returns the ${name}.`,
      parameters: { type: "object", properties, required: Object.keys(properties), additionalProperties: false },
      parse: JSON.parse,
      function: (input) => (called.push([name, input]), String(run(input))),
    },
  });
  const runner = client.chat.completions.runTools({
    ...base,
    messages: [{ role: "user", content: "What is the temperature in Bern plus 2? Use temperature first, then sum." }],
    tools: [
      definition("temperature", { city: { type: "string", enum: ["Bern", "Oslo"] } }, () => 7),
      definition("sum", { a: number, b: number }, ({ a, b }) => a + b),
    ],
    max_tokens: 128,
    stream: true,
  }, { maxChatCompletions: 4 });
  await runner.done();
  return { called, roles: runner.messages.map((message) => message.role) };
}

async function parsed() {
  const chat = await client.chat.completions.parse({
    ...base,
    messages: MESSAGES,
    max_tokens: 64,
    response_format: zodResponseFormat(City, "city"),
  });
  const response = await client.responses.parse({
    ...base,
    input: MESSAGES,
    max_output_tokens: 64,
    text: { format: zodTextFormat(City, "city") },
  });
  return { chat: chat.choices[0].message.parsed, response: response.output_parsed };
}

async function responseStream() {
  const types = new Set();
  const stream = client.responses.stream({ ...base, input: "Name three colors.", max_output_tokens: 32 });
  for await (const event of stream) types.add(event.type);
  return { types: [...types], text: (await stream.finalResponse()).output_text };
}

async function customTool() {
  const shell = { type: "custom", name: "shell", format: { type: "grammar", syntax: "regex", definition: "ls [a-z]+" } };
  const input = "List the files of the folder src.";
  const choice = { type: "custom", name: "shell" };
  const stream = client.responses.stream({ ...base, input, tools: [shell], tool_choice: choice, max_output_tokens: 64 });
  let deltas = "";
  stream.on("response.custom_tool_call_input.delta", (event) => (deltas += event.delta));
  const { output } = await stream.finalResponse();
  const call = output.find((item) => item.type === "custom_tool_call");
  const result = { type: "custom_tool_call_output", call_id: call.call_id, output: "main.c" };
  const next = await client.responses.create({
    ...base,
    input: [{ role: "user", content: input }, ...output, result],
    tools: [shell],
    tool_choice: "none",
    max_output_tokens: 16,
  });
  return { deltas, input: call.input, status: next.status };
}

const results = {
  chat_stream: await chatStream(),
  tool_loop: await toolLoop(),
  parsed: await parsed(),
  response_stream: await responseStream(),
  custom_tool: await customTool(),
};
console.log(JSON.stringify(results));
