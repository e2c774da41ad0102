// Drives the `Chat` of one major of the AI SDK, by commands on stdin, one JSON a line; each is answered on stdout.
//
//   node ui_messages.mjs 7
//   {"do": "new", "chat": "a", "api": "http://…", "id": …, "body": {…}, "messages": […]}
//   {"do": "send" | "regenerate" | "resume" | "stop", "chat": "a", "text": "Hi"}       begun, not awaited
//   {"do": "until", "chat": "a", "status": "ready" | "text": "so far"}                   awaited
//   {"do": "show", "chat": "a"}                                                          messages, status, error

import { createInterface } from "node:readline";

const [major] = process.argv.slice(2);
const { Chat } = await import(`@ai-sdk/react-v${major}`);
const { DefaultChatTransport } = await import(`ai-v${major}`);
const chats = {};

const text = (chat) =>
  (chat.lastMessage?.role === "assistant" ? chat.lastMessage.parts : [])
    .filter((part) => part.type === "text").map((part) => part.text).join("");

const show = (chat) => ({
  messages: chat.messages,
  text: text(chat),
  status: chat.status,
  error: chat.error && { name: chat.error.name, message: chat.error.message },
  finished: chat.finished,
});

const commands = {
  new({ chat: name, api, id, body, messages }) {
    const transport = new DefaultChatTransport({ api, body });
    const onFinish = ({ message, messages, ...rest }) => chats[name].finished.push(rest);
    chats[name] = Object.assign(new Chat({ id, transport, messages, onFinish, onError: () => {} }), { finished: [] });
  },
  send: ({ chat, text, parts }) => void chats[chat].sendMessage(parts ? { role: "user", parts } : { text }),
  regenerate: ({ chat }) => void chats[chat].regenerate(),
  resume: ({ chat }) => void chats[chat].resumeStream(),
  stop: ({ chat }) => void chats[chat].stop(),
  async until({ chat, status, text: expected }) {
    for (const began = Date.now(); Date.now() - began < 10_000; await new Promise((done) => setTimeout(done, 5))) {
      if (status ? chats[chat].status === status : text(chats[chat]) === expected) return show(chats[chat]);
    }
    return { timeout: show(chats[chat]) };
  },
  show: ({ chat }) => show(chats[chat]),
};

for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line);
  console.log(JSON.stringify((await commands[command.do](command)) ?? null));
}
