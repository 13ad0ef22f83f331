// Requests to the server. Addresses are relative, so that the page also works below a path of a proxy.

const KEY = "muntin-token";
const TRIES = 4;

/** An error with the server's own words. `status`: of HTTP, 0 if no answer came. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const hasToken = () => sessionStorage.getItem(KEY) !== null;
export const forgetToken = () => sessionStorage.removeItem(KEY);
export const keepToken = (token) => sessionStorage.setItem(KEY, token);

async function request(path, options = {}) {
  const token = sessionStorage.getItem(KEY);
  const headers = token === null ? {} : { authorization: `Bearer ${token}` };
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer.", 0);
  }
  if (response.ok) return response;
  const document = await response.json().catch(() => ({}));
  const error = new ServerError(document.error ?? `The server answered ${response.status}.`, response.status);
  error.retryAfter = Number(response.headers.get("retry-after")) || 1;
  throw error;
}

export const status = async () => (await request("page/status")).json();
export const model = async (version) => (await request(`page/model/${encodeURIComponent(version)}`)).json();

/**
 * Sends a picture. `version`: "" for the one that the server chooses. Asks again when the server is full.
 * Returns {blob, version, times}, times in milliseconds: wait, compute, total in the server, and round, from here to here.
 */
export async function predict(file, { output, version, signal }) {
  const query = new URLSearchParams({ output, ...(version && { version }) });
  for (let tries = 1; ; tries += 1) {
    const began = performance.now();
    try {
      const options = { method: "POST", body: file, headers: { "content-type": "application/octet-stream" }, signal };
      const response = await request(`predict?${query}`, options);
      const blob = await response.blob();
      const times = { round: performance.now() - began };
      for (const [, name, duration] of (response.headers.get("server-timing") ?? "").matchAll(/(\w+);dur=([\d.]+)/g)) {
        times[name] = Number(duration);
      }
      return { blob, version: response.headers.get("x-model-version") ?? "", times };
    } catch (error) {
      if (error.status !== 503 || version || tries === TRIES) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * Math.min(error.retryAfter, 10)));
      signal.throwIfAborted();
    }
  }
}
