// Drives one major of the `openai` package, or LangChain's on top of it, by commands on stdin, one JSON a line; each is
// answered on stdout with what the program has seen.
//
//   node openai.mjs 7 http://127.0.0.1:8000/v1
//   {"do": "create", "params": {"messages": […], "stream": true}, "options": {…}, "leave": 1}    leaves after so many deltas
//   {"do": "models"}
//   {"do": "langchain", "messages": […], "stream": true}                                          the newest major only

import { createInterface } from "node:readline";

const [major, baseURL, apiKey = "any"] = process.argv.slice(2);
const { default: OpenAI } = await import(`openai-v${major}`);
const client = new OpenAI({ baseURL, apiKey });

const told = (error) => ({
  class: error.constructor.name,
  status: error.status,
  code: error.code,
  param: error.param,
  type: error.type,
  message: error.message,
  requestId: error.requestID ?? error.request_id,
});

const commands = {
  async create({ params, options, leave }) {
    const seen = { content: "", reasoning: "", chunks: 0 };
    try {
      const answer = await client.chat.completions.create({ model: "grok-4.3", ...params }, options);
      if (!params.stream) return { ...seen, answer, content: answer.choices[0].message.content };
      for await (const chunk of answer) {
        const choice = chunk.choices[0];
        seen.content += choice?.delta.content ?? "";
        seen.reasoning += choice?.delta.reasoning_content ?? "";
        seen.finish = choice?.finish_reason ?? seen.finish;
        seen.usage = chunk.usage ?? seen.usage;
        if (++seen.chunks === leave) break;
      }
    } catch (error) {
      seen.error = told(error);
    }
    return seen;
  },
  async models() {
    const models = [];
    for await (const model of client.models.list()) models.push(model.id);
    return models;
  },
  async langchain({ messages, stream }) {
    const { ChatOpenAI } = await import("@langchain/openai");
    const model = new ChatOpenAI({ model: "grok-4.3", apiKey, configuration: { baseURL }, streaming: stream });
    const seen = { content: "" };
    try {
      if (!stream) {
        const answer = await model.invoke(messages);
        return { content: answer.content, usage: answer.usage_metadata };
      }
      for await (const piece of await model.stream(messages)) {
        seen.content += piece.content;
        seen.usage = piece.usage_metadata ?? seen.usage;
      }
    } catch (error) {
      seen.error = told(error);
    }
    return seen;
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line);
  console.log(JSON.stringify(await commands[command.do](command)));
}
