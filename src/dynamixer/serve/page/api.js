// The server's answers, and its refusals as errors whose message is a sentence.

let token = sessionStorage.getItem("token");

export function useToken(value) {
  token = value;
  sessionStorage.setItem("token", value);
}

export class Refusal extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The server did not answer: it has stopped, or closed the connection.");
  }
  if (!response.ok) {
    const { error } = await response.json().catch(() => ({ error: response.statusText }));
    throw new Refusal(response.status, error.charAt(0).toUpperCase() + error.slice(1));
  }
  return response;
}

export const getJson = async (path) => (await ask(path)).json();
export const getBlob = async (path) => (await ask(path)).blob();

export async function postPicture(path, blob, signal) {
  const headers = { "Content-Type": "application/octet-stream" };
  return (await ask(path, { method: "POST", body: blob, headers, signal })).json();
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
