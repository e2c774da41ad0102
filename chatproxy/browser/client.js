// @ts-self-types="./client.d.ts"
/**
 * Asks chatproxy, and gives the answer as it is written. client.d.ts has the types, and describes what is exported.
 * @import { Answer, ChatEvent, Message, Options } from "./client.d.ts"
 */

// Bundlers take `new URL("…", import.meta.url)` for a file that they should add, so it stands alone.
const here = import.meta.url;

// Tries in a row: a few seconds to reach the service, about a minute to find an answer again.
const ASKS = 4, RESUMES = 30;

// Milliseconds. The service sends a comment after 15 s of silence; after four times that, the connection is dead.
const SILENCE = 60_000;

// Seconds. A longer Retry-After is not waited for, but told.
const SHORT = 5;

export class ChatError extends Error {
  /**
   * @param {{ code: string, message: string, param?: string | null, request_id?: string }} problem
   * @param {Response} [response]
   */
  constructor({ code, message, param, request_id }, response) {
    super(message);
    this.name = "ChatError";
    this.code = code;
    this.status = response?.status ?? 0;
    this.param = param ?? null;
    this.requestId = request_id ?? response?.headers.get("X-Request-ID") ?? "";
    this.retryAfter = Number(response?.headers.get("Retry-After")) || 0;
  }
}

/**
 * @param {string | Message[]} messages
 * @param {Options} [options]
 * @returns {Answer}
 */
export function ask(messages, options = {}) {
  const { service, token, sessionId, tools, signal, onText, onReasoning, onEvent, resumable = true } = options;
  const { include = onReasoning ? ["reasoning"] : [] } = options;
  const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
  const state = { lastEventId: "", retry: 2000 };
  /** @type {ChatEvent[]} */
  const events = [];
  /** @type {(() => void)[]} */
  const waiting = []; // for the next event, or the end
  let text = "", began = false, ended = false, tries = 0;
  let url = ""; // of the answer, once it is known
  let connection = new AbortController();
  /** @type {(error?: unknown) => void} */
  let settle;

  /** @type {Promise<string>} */
  const whole = new Promise((resolve, reject) => {
    settle = (error) => (error === undefined ? resolve(text) : reject(error));
  });

  const wake = () => waiting.splice(0).forEach((resume) => resume());
  const abort = () => stop(signal?.reason);

  /** @param {unknown} [error] */
  function end(error) {
    ended = true;
    settle(error);
    signal?.removeEventListener("abort", abort);
    wake();
  }

  /** @param {unknown} [reason] */
  function stop(reason = new ChatError({ code: "stopped", message: "Stopped." })) {
    if (ended) return;
    end(reason);
    // A resumable answer would go on without us, so its URL is waited for.
    if (url || !resumable) hangUp();
  }

  function hangUp() {
    connection.abort();
    // Without headers of its own this needs no preflight; `keepalive` lets a page send it while it is being closed.
    if (url) fetch(`${url}/stop`, { method: "POST", headers, keepalive: true }).catch(() => {});
  }

  /** @param {ChatEvent} event */
  function emit(event) {
    events.push(event);
    if (event.type === "text") text += event.text;
    wake();
    try {
      onEvent?.(event);
      if (event.type === "text") onText?.(event.text);
      if (event.type === "reasoning") onReasoning?.(event.text);
    } catch (error) {
      stop(error);
    }
  }

  /** @param {string} type @param {string} data */
  function dispatch(type, data) {
    tries = 0;
    if (ended) return;
    if (type === "message" && data === "[DONE]") end();
    else if (type === "message") emit({ type: "text", text: data });
    else if (type === "reasoning") emit({ type, text: data });
    else if (type === "citations") emit({ type, citations: JSON.parse(data) });
    else if (type === "tool" || type === "finish") emit({ ...JSON.parse(data), type });
    else if (type === "error") end(new ChatError(JSON.parse(data).error));
  }

  /**
   * Asks, or resumes where there is something to resume, and reads as long as the connection lasts. Gives a refusal.
   * @param {string} chat @param {RequestInit} request
   */
  async function connect(chat, request) {
    const current = connection = new AbortController(), { signal } = current;
    const watch = () => setTimeout(() => current.abort(), SILENCE);
    let watchdog = watch();
    try {
      const response = await fetch(url ? `${url}/stream` : chat, url
        ? { headers: { ...headers, "Last-Event-ID": state.lastEventId }, signal }
        : { ...request, signal });
      if (response.status !== 200) return await refusal(response);
      if (!response.body || !response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
        return new ChatError({ code: "not_an_event_stream", message: "What answered is not the service." }, response);
      }
      began = true;
      const id = /[^/]+(?=\/stream$)/.exec(response.headers.get("Content-Location") ?? "");
      if (id) url = `${chat}/${id[0]}`;
      if (ended) return hangUp();
      const read = parser(state, dispatch);
      for (const reader = response.body.getReader(); ; ) {
        const { done, value } = await reader.read();
        if (done) return;
        clearTimeout(watchdog);
        watchdog = watch();
        read(value);
      }
    } finally {
      clearTimeout(watchdog);
    }
  }

  async function run() {
    const chat = new URL("api/chat", service ? new URL(service.replace(/\/*$/, "/"), here) : here);
    if (!/^http/.test(chat.protocol)) throw new TypeError("The address of the service is missing.");
    const conversation = typeof messages === "string" ? [{ role: "user", content: messages }] : messages;
    const request = {
      method: "POST",
      headers: {
        Accept: "text/event-stream",
        "Content-Type": "application/json",
        // The same key is the same answer, so asking again is safe while nobody knows whether the request arrived.
        ...(resumable && { "Idempotency-Key": randomKey() }),
        ...headers,
      },
      body: JSON.stringify({ messages: conversation, sessionId, include, tools, resumable }),
    };
    for (;;) {
      const refused = await connect(chat.href, request).catch(() => {}); // whatever is thrown, the connection is lost
      if (ended) return;
      const message = began ? "The connection was lost." : "The service cannot be reached.";
      const error = refused ?? new ChatError({ code: "connection_lost", message });
      const { status, retryAfter } = error;
      let seconds = Math.min(250 * 2 ** tries, state.retry) / 1000 * (0.5 + Math.random() / 2);
      let again = tries < ASKS;
      if (url) again = tries < RESUMES && (!refused || status === 429 || status >= 500);
      else if (!refused) again &&= resumable && !began;
      else {
        again &&= (status === 429 || status === 503) && retryAfter > 0 && retryAfter <= SHORT;
        seconds = retryAfter;
      }
      if (!again) return end(error);
      tries++;
      emit({ type: "retry", error, seconds });
      await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
      if (ended) return;
    }
  }

  async function* iterate() {
    whole.catch(() => {}); // its error is thrown here
    try {
      for (let n = 0; n < events.length || !ended; ) {
        if (n < events.length) yield events[n++];
        else await new Promise((resolve) => waiting.push(() => resolve(undefined)));
      }
      await whole;
    } finally {
      stop();
    }
  }

  signal?.addEventListener("abort", abort);
  if (signal?.aborted) abort();
  else run().catch(end);
  return Object.assign(whole, { stop: () => stop(), [Symbol.asyncIterator]: iterate });
}

/**
 * A function that takes the bytes of an event stream, cut anywhere, and dispatches the events, by the rules of the
 * HTML standard ("Server-sent events"). `state` follows what frames say, also those without an event.
 * @param {{ lastEventId: string, retry: number }} state
 * @param {(type: string, data: string) => void} dispatch
 */
function parser(state, dispatch) {
  const utf8 = new TextDecoder(); // keeps a character that was cut in two
  let rest = "", afterCR = false; // an unfinished line; the LF of a CR LF may still come
  let type = "", data = "", id = state.lastEventId;
  return (/** @type {Uint8Array} */ bytes) => {
    const text = utf8.decode(bytes, { stream: true });
    if (!text) return;
    const lines = (afterCR && text[0] === "\n" ? text.slice(1) : text).split(/\r\n|\r|\n/);
    afterCR = text.endsWith("\r");
    lines[0] = rest + lines[0];
    rest = lines.pop() ?? "";
    for (const line of lines) {
      const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line) ?? []; // a comment is a field without a name
      if (line === "") { // a blank line ends the frame; only now does its id count
        state.lastEventId = id;
        if (data) dispatch(type || "message", data.slice(0, -1));
        type = data = "";
      } else if (field === "data") data += value + "\n";
      else if (field === "event") type = value;
      else if (field === "id" && !value.includes("\0")) id = value;
      else if (field === "retry" && /^[0-9]+$/.test(value)) state.retry = Number(value);
    }
  };
}

/**
 * The service's own words, if it was the service: a proxy before it may answer with HTML.
 * @param {Response} response
 */
async function refusal(response) {
  const { status } = response, { error } = (await response.json().catch(() => null)) ?? {};
  if (typeof error?.code === "string") return new ChatError(error, response);
  const [code, message] = status === 204 // nothing more will come, says the service, and the end has not been seen
    ? ["connection_lost", "The rest of the answer is gone."]
    : [`http_${status}`, `Something before the service answered ${status}.`];
  return new ChatError({ code, message }, response);
}

/** Not `randomUUID`, which browsers lack on plain http; Node 18 has no `crypto`. */
function randomKey() {
  const random = new Uint32Array(4).map(() => Math.random() * 2 ** 32);
  return (globalThis.crypto?.getRandomValues(random) ?? random).join("-");
}
