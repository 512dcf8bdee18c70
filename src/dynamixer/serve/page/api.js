// The server's answers, and its refusals as errors whose message is a sentence.

let token = sessionStorage.getItem("token");

export function useToken(value) {
  token = value;
  if (value) sessionStorage.setItem("token", value);
  else sessionStorage.removeItem("token");
}

export const hasToken = () => Boolean(token);

export class Refusal extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

function headersWith(given) {
  try {
    return new Headers({ ...given, ...(token ? { Authorization: `Bearer ${token}` } : {}) });
  } catch {
    useToken(null);
    throw new Refusal(401, "This token has letters that cannot be sent, so it is not the server’s.");
  }
}

async function ask(path, options = {}) {
  const headers = headersWith(options.headers);
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The server did not answer: it has stopped, or closed the connection.");
  }
  if (!response.ok) {
    const said = await response.json().catch(() => null); // a proxy's answer may be a page, or JSON of its own
    let sentence = `The server answered ${response.status}.`;
    if (said?.error && typeof said.error === "string") sentence = said.error.charAt(0).toUpperCase() + said.error.slice(1);
    if (response.status === 401 && !headers.has("Authorization")) sentence = ""; // the form says it
    throw new Refusal(response.status, sentence);
  }
  return response;
}

// The body of an answer, which may be cut off on its way.
async function body(response, kind) {
  try {
    return await response[kind]();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The answer was cut off on its way: try again.");
  }
}

export const getJson = async (path) => body(await ask(path), "json");
export const getBlob = async (path, signal) => body(await ask(path, { signal }), "blob");

export async function postPicture(path, blob, signal) {
  const headers = { "Content-Type": "application/octet-stream" };
  return body(await ask(path, { method: "POST", body: blob, headers, signal }), "json");
}

// Ask again while the server says that it is not ready yet.
export async function patiently(request, seconds = 600) {
  for (const start = Date.now(); ; ) {
    try {
      return await request();
    } catch (error) {
      if (error.status !== 503 || Date.now() - start > 1000 * seconds) throw error;
      await new Promise((resolve) => setTimeout(resolve, 700));
    }
  }
}
