// A request as a command and as a program.

// Parameters of `client.chat.completions.create`; all others are passed as `extra_body`.
const OPENAI_FIELDS = new Set(
  ["model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "seed", "logprobs"].concat(
    ["tools", "response_format", "frequency_penalty", "presence_penalty", "stop"],
  ),
);

/** Returns a curl command for POSIX shells. */
export function curlCommand(url, body, hasKey) {
  const key = hasKey ? ' -H "Authorization: Bearer $PACELINE_API_KEY"' : "";
  return `curl -N ${quoted(url)} -H 'Content-Type: application/json'${key} -d ${quoted(JSON.stringify(body, null, 1))}`;
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Returns a program for OpenAI's client. */
export function pythonProgram(url, body, hasKey) {
  const own = Object.entries(body).filter(([name]) => OPENAI_FIELDS.has(name));
  const extra = Object.entries(body).filter(([name]) => !OPENAI_FIELDS.has(name));
  const key = hasKey ? 'os.environ["PACELINE_API_KEY"]' : '"none"';
  const lines = own.map(([name, value]) => `    ${name}=${pythonLiteral(value)},`);
  if (extra.length) lines.push(`    extra_body=${pythonLiteral(Object.fromEntries(extra))},`);
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(url.replace(/\/chat\/completions$/, ""))}, api_key=${key})`,
    "stream = client.chat.completions.create(",
    ...lines,
    ")",
    "for chunk in stream:",
    "    if chunk.choices:",
    '        print(chunk.choices[0].delta.content or "", end="", flush=True)',
  ].join("\n");
}

function pythonLiteral(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  const items = Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${pythonLiteral(each)}`);
  return `{${items.join(", ")}}`;
}
