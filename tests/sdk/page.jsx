// The page that `useChat` drives. Its address says what for: #{"id": …, "resume": true, "api": …, "body": {…}}
// esbuild puts one major of the packages in the place of "ai" and "@ai-sdk/react".

import { useChat } from "@ai-sdk/react";
import { DefaultChatTransport } from "ai";
import OpenAI from "openai";
import { createRoot } from "react-dom/client";

const { id, resume, throttle, ...request } = JSON.parse(decodeURIComponent(location.hash.slice(1)) || "{}");

// Without options it is `useChat()` as everybody begins with it.
const options = Object.keys(request).length ? { transport: new DefaultChatTransport(request) } : {};
if (id) options.id = id;
if (resume) options.resume = true;
if (throttle) options.experimental_throttle = options.throttle = throttle;

const say = (error) => { try { return JSON.parse(error.message).error.message } catch { return error.message } };

function App() {
  const { messages, sendMessage, status, error, stop, regenerate } = useChat(options);
  Object.assign(window, { messages, sendMessage, stop, regenerate });
  return <main>
    {messages.map((message) => <section key={message.id} className={message.role}>
      {message.parts.map((part, number) => <pre key={number} className={part.type}>{part.text}</pre>)}
    </section>)}
    <output id="status">{status}</output>
    <output id="error">{error && say(error)}</output>
  </main>;
}

window.OpenAI = OpenAI;
createRoot(document.body.appendChild(document.createElement("div"))).render(<App />);
