// The page at /dashboard: signs in, follows the stream, and sends what a person wants done to the API
import {mount} from "/dashboard/view.js"

const API = "/api/v1", SILENT = 10_000 // ms without a word, after which the stream is taken for lost
const login = document.getElementById("login"), view = document.getElementById("view"), wrong = document.getElementById("wrong")
const tokens = {} // in memory only
let hear = null

async function ask(method, path, body, headers = {}) { // what the API answers, as {status, body}
  if (tokens.access_token) headers.Authorization = `Bearer ${tokens.access_token}`
  if (body) headers["Content-Type"] = "application/json"
  const answer = await fetch(API + path, {method, headers, body: body && JSON.stringify(body)})
  const text = await answer.text()
  try { return {status: answer.status, body: JSON.parse(text)} }
  catch { return {status: answer.status, body: {error: text || answer.statusText}} }
}

function why(body) { // the sentence of a refusal
  const said = body.error || body.detail
  return typeof said === "string" ? said : JSON.stringify(said)
}

let refreshing = null // one at a time: a token of refresh counts once

function refreshed() { // whether there is a token that is valid again
  const renew = async () => {
    if (!tokens.refresh_token) return false
    const found = await ask("POST", "/auth/refresh", {refresh_token: tokens.refresh_token})
    if (found.status >= 400) return false
    Object.assign(tokens, found.body)
    return true
  }
  refreshing ||= renew().catch(() => false).finally(() => { refreshing = null })
  return refreshing
}

const ROUTES = { // how each act is asked for
  stop: each => ["PUT", "/risk/mode", {mode: "NO_ENTRY", session: each.session, reason: each.reason}],
  reduce: each => ["PUT", "/risk/mode", {mode: "REDUCING", session: each.session, reason: each.reason}],
  emergency: each => ["POST", "/emergency", {session: each.session, reason: each.reason}],
  acknowledge: each => ["POST", `/alerts/${each.number}/acknowledge`, null],
}

async function send(request) { // an answer as the view wants it
  const headers = {"Idempotency-Key": request.id}
  if (request.code) headers["X-Confirm"] = request.code
  let found = await ask(...ROUTES[request.act](request), headers)
  if (found.status === 401 && await refreshed()) found = await ask(...ROUTES[request.act](request), headers)
  return found.status >= 400 ? {error: why(found.body)} : found.body
}

async function listen() { // one connection, until it ends
  const over = new AbortController()
  const patient = () => setTimeout(() => over.abort(), SILENT)
  let timer = patient(), rest = ""
  try {
    const answer = await fetch(`${API}/dashboard/stream`, {headers: {Authorization: `Bearer ${tokens.access_token}`}, signal: over.signal})
    if (!answer.ok) return answer.status
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader()
    for (;;) {
      const {done, value} = await reader.read()
      if (done) return 0
      clearTimeout(timer)
      timer = patient()
      const events = (rest + value).split("\n\n")
      rest = events.pop()
      for (const event of events) if (event.startsWith("data: ")) hear({look: JSON.parse(event.slice(6))})
    }
  }
  catch { return 0 }
  finally { clearTimeout(timer) }
}

async function follow() { // again and again, until nobody is signed in
  for (let pause = 500; ; pause = Math.min(2 * pause, 10_000)) {
    const began = performance.now(), status = await listen()
    if (status === 401) {
      if (await refreshed()) continue
      return ask_who()
    }
    if (performance.now() - began > 5_000) pause = 500
    hear({lost: document.body.dataset.lost})
    await new Promise(go => setTimeout(go, pause))
  }
}

function ask_who() {
  for (const name of Object.keys(tokens)) delete tokens[name]
  view.hidden = true
  login.hidden = false
  document.getElementById("name").focus()
  performance.mark("ready")
}

login.addEventListener("submit", async event => {
  event.preventDefault()
  wrong.textContent = ""
  performance.mark("sent")
  const given = Object.fromEntries(new FormData(login))
  const found = await ask("POST", "/auth/token", given).catch(error => ({status: 503, body: {error: String(error.message || error)}}))
  if (found.status >= 400) {
    wrong.textContent = `✕ ${why(found.body)}`
    return document.getElementById("password").focus()
  }
  Object.assign(tokens, found.body)
  login.reset()
  login.hidden = true
  view.hidden = false
  if (!hear) mount(view, {look: null, on: given => { hear = given }, send})
  follow()
})

ask_who()
