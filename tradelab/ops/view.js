// What sessions do, drawn into an element: {look, on, send}
// look: the first view, or null; on(hear): hear({look}) or hear({lost}) from then on; send(request): a promise of an answer
const OLD = 6_000 // ms without news, from which on what is shown is marked as old
let counted = 0

function made(name, attributes = {}, ...children) {
  const node = document.createElement(name)
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value)
    else if (value !== false && value != null) node.setAttribute(key, value === true ? "" : value)
  }
  node.append(...children.filter(each => each != null))
  return node
}

function named() { return `tradelab-${++counted}` }

function unique() { return [...crypto.getRandomValues(new Uint8Array(12))].map(each => each.toString(16).padStart(2, "0")).join("") }

function changed(node, value) { // whether something is to be drawn again
  const said = JSON.stringify(value)
  if (node.said === said) return false
  node.said = said
  return true
}

function cell(value, label, head) {
  const [text, tone, share] = Array.isArray(value) ? value : [value]
  const content = [made("span", {class: tone || null}, text)]
  if (share != null) content.push(made("meter", {min: 0, max: 1, value: share, "aria-label": label}))
  return made(head ? "th" : "td", {role: head ? "rowheader" : "cell", scope: head ? "row" : null, "data-label": label}, ...content)
}

function table(part, extra) {
  if (!part.rows.length) return made("p", {class: "quiet"}, part.none)
  const head = part.columns.map(each => made("th", {role: "columnheader", scope: "col"}, each))
  if (extra) head.push(made("td", {role: "columnheader"}))
  const rows = part.rows.map(row => made("tr", {role: "row"}, ...row.map((each, n) => cell(each, part.columns[n], n === 0)),
                                         extra && extra(row)))
  return made("table", {role: "table"}, made("thead", {role: "rowgroup"}, made("tr", {role: "row"}, ...head)),
              made("tbody", {role: "rowgroup"}, ...rows))
}

function card(title, ...children) {
  const id = named()
  return made("section", {"aria-labelledby": id}, made("h2", {id}, title), ...children)
}

function colours(root) {
  const style = getComputedStyle(root)
  return name => style.getPropertyValue(name).trim()
}

function line(place, name, height, stroke, fill, track, format) { // one curve of uPlot
  const colour = colours(place), width = Math.max(place.clientWidth, 200)
  const days = (_, times) => times.map(time => { const said = new Date(time * 1e3).toISOString(); return said.slice(11, 16) === "00:00" ? said.slice(5, 10) : said.slice(11, 16) })
  const axis = {stroke: colour("--quiet"), grid: {stroke: colour("--line"), width: 1}, ticks: {show: false}, font: "12px sans-serif"}
  const series = {label: name, stroke: colour(stroke), width: 2, fill: fill ? colour(fill) : undefined, points: {show: false}}
  return new uPlot({width, height, legend: {show: false}, cursor: {show: false}, tzDate: time => uPlot.tzDate(new Date(time * 1e3), "Etc/UTC"),
                    axes: [{...axis, values: days}, {...axis, size: 70, values: (_, values) => values.map(format)}], series: [{}, series]},
                   [track.time, track[name]], place)
}

function candles(place, track, symbol, locale, priceFormatter) { // prices with fills, of Lightweight Charts
  const colour = colours(place), kit = window.LightweightCharts
  const chart = kit.createChart(place, {width: place.clientWidth, height: 260, handleScroll: false, handleScale: false,
    layout: {attributionLogo: false, background: {color: "transparent"}, textColor: colour("--quiet"), fontFamily: "sans-serif"},
    grid: {vertLines: {visible: false}, horzLines: {color: colour("--line")}}, rightPriceScale: {borderVisible: false},
    timeScale: {borderVisible: false, timeVisible: true}, localization: {locale, priceFormatter}})
  const series = chart.addSeries(kit.CandlestickSeries, {upColor: "transparent", borderUpColor: colour("--good"), wickUpColor: colour("--good"),
    downColor: colour("--bad"), borderDownColor: colour("--bad"), wickDownColor: colour("--bad"), priceLineVisible: false})
  const prices = track.prices[symbol]
  series.setData(prices.map(([time, open, close]) => ({time, open, close, high: Math.max(open, close), low: Math.min(open, close)})))
  kit.createSeriesMarkers(series, track.fills.filter(each => each.symbol === symbol).map(each => ({time: each.time,
    position: each.bought ? "belowBar" : "aboveBar", shape: each.bought ? "arrowUp" : "arrowDown", color: colour("--ink")})))
  chart.timeScale().fitContent()
  return chart
}

function drawn(root, state, track, words) { // equity, drawdown and prices, again
  for (const each of state.charts.splice(0)) (each.destroy || each.remove).call(each)
  for (const each of ["equity", "drawdown", "prices"]) state[each].replaceChildren()
  if (!track || track.time.length < 2) return
  const short = value => value.toLocaleString(words.locale, {maximumFractionDigits: 2}).replaceAll(words.locale === "es" ? "." : "\u00a0", "\u00a0")
  state.charts.push(line(state.equity, "equity", 180, "--accent", "", track, short),
                    line(state.drawdown, "drawdown", 110, "--bad", "--bad-soft", track, value => `${short(value)} %`))
  if (track.prices[state.symbol]) state.charts.push(candles(state.prices, track, state.symbol, words.locale, short))
  for (const each of ["equity", "drawdown"]) state[each].setAttribute("aria-label", track.said[each])
  state.prices.setAttribute("aria-label", track.said.prices[state.symbol] || words.none)
}

function field(label, attributes) {
  const id = named(), input = made("input", {id, autocomplete: "off", ...attributes})
  return [made("label", {for: id}, label), input]
}

async function heard(say, send, request) { // the answer, or why there is none
  try { return await send(request) }
  catch (error) { return {error: String(error.message || error)} }
}

function asked(root, act, look, session, send) { // a dialog that asks once more, and for a code where one is given
  const words = look.words, title = named(), request = {act: act.name, session, id: unique()}
  const why = field(words.reason, {required: true, maxlength: 200, value: words.by_dashboard})
  const typed = act.type ? field(act.type_words, {required: true, autocapitalize: "characters", spellcheck: "false"}) : []
  const code = field(words.code, {inputmode: "numeric", maxlength: 12}), wrong = made("p", {role: "alert", class: "bad"})
  const said = made("p", {}, act.words), fields = made("div", {class: "fields"}, ...why, ...typed)
  const go = made("button", {type: "submit", class: act.type ? "danger" : "main"}, act.title)
  const leave = made("button", {type: "button", onclick: () => dialog.close()}, words.leave)
  const form = made("form", {novalidate: true}, made("h2", {id: title}, act.title), made("p", {class: "quiet"}, session || words.all),
                    said, fields, wrong, made("div", {class: "buttons"}, leave, go))
  const dialog = made("dialog", {"aria-labelledby": title, onclose: () => dialog.remove()}, form)
  const refuse = (text, input) => { wrong.textContent = `✕ ${text}`; input.setAttribute("aria-invalid", "true"); input.focus() }
  form.addEventListener("submit", async event => {
    event.preventDefault()
    wrong.textContent = ""
    if (go.getAttribute("aria-disabled")) return
    if (!why[1].value.trim()) return refuse(words.needs_reason, why[1])
    if (typed.length && typed[1].value.trim().toUpperCase() !== act.type) return refuse(act.type_words, typed[1])
    if (request.planned && !code[1].value.trim()) return refuse(words.code, code[1])
    go.setAttribute("aria-disabled", "true")
    const answer = await heard(words, send, {...request, reason: why[1].value.trim(), code: request.planned ? code[1].value.trim() : ""})
    go.removeAttribute("aria-disabled")
    if (answer.confirm) {
      request.planned = true
      said.replaceChildren(act.words, made("br"), made("strong", {}, `${words.code_is} ${answer.confirm}`))
      fields.replaceChildren(...code)
      return code[1].focus()
    }
    if (answer.error) return refuse(answer.error, request.planned ? code[1] : why[1])
    said.replaceChildren(`✓ ${answer.answer}`)
    said.setAttribute("role", "status")
    fields.replaceChildren()
    go.remove()
    leave.textContent = words.close
    leave.focus()
  })
  root.append(dialog)
  dialog.showModal()
  ;(typed[1] || go).focus()
}

function acknowledged(look, send, status) { // a button for an alert that nobody has acknowledged yet
  return row => {
    const number = look.alerts.open[row[0]]
    if (!number) return made("td", {role: "cell"})
    const press = async event => {
      event.currentTarget.setAttribute("aria-disabled", "true")
      const answer = await heard(look.words, send, {act: "acknowledge", number, id: unique()})
      status.textContent = answer.error ? `✕ ${answer.error}` : `✓ ${answer.answer}`
    }
    return made("td", {role: "cell"}, made("button", {type: "button", "data-key": `alert-${number}`, onclick: press,
                                                      "aria-label": `${look.words.acknowledge} ${number}`}, look.words.acknowledge))
  }
}

function replaced(place, ...children) { // new content; the keyboard stays where it was
  const key = place.contains(document.activeElement) && document.activeElement.dataset.key
  place.replaceChildren(...children)
  if (key) (place.querySelector(`[data-key="${key}"]`) || place.querySelector("button"))?.focus()
}

function skeleton(element) { // what is made once
  const state = {charts: [], symbol: "", chosen: "", tracks: {}}
  const of = (name, attributes, ...children) => state[name] = made("div", attributes, ...children)
  element.classList.add("tradelab-view")
  element.setAttribute("data-lm-suppress-shortcuts", "true")
  const head = made("header", {}, of("sessions", {class: "sessions", role: "group"}), of("acts", {class: "buttons"}))
  state.fresh = made("p", {class: "fresh", role: "status"})
  state.status = made("p", {class: "said", role: "status"})
  state.news = made("p", {class: "hidden", role: "alert"})
  element.replaceChildren(head, state.fresh, state.status, state.news, of("body", {class: "body"}, of("note", {}), of("facts", {class: "facts"}),
    of("alerts", {}), of("curves", {class: "grid"}), of("parts", {class: "grid"})), of("foot", {class: "quiet foot"}))
  for (const each of ["equity", "drawdown", "prices"]) of(each, {class: "chart", role: "img"})
  return state
}

function headed(element, state, look, again, send) { // sessions to choose from, and what may be done
  const words = look.words, before = state.chosen, session = look.sessions.find(each => each.id === before) || look.sessions[0]
  state.chosen = session ? session.id : ""
  if (before && session && session.id !== before) state.status.textContent = `⚠ ${before} ${words.gone} ${session.id}`
  if (changed(state.sessions, [state.chosen, look.sessions.map(each => [each.id, each.mark])])) {
    state.sessions.setAttribute("aria-label", words.sessions)
    replaced(state.sessions, ...look.sessions.map(each => made("button", {type: "button", "data-key": each.id, "aria-pressed": String(each.id === state.chosen),
      onclick: () => { state.chosen = each.id; state.status.textContent = ""; again() }}, each.mark, " ", each.id)))
  }
  if (changed(state.acts, [look.acts, state.chosen])) replaced(state.acts, ...look.acts.map(act => made("button", {type: "button",
    "data-key": act.name, class: act.type ? "danger" : null, onclick: () => asked(element, act, state.look, state.chosen, send)}, act.title)))
  return session
}

function pictured(element, state, session, words) { // the curves, if there is something new
  const track = session && state.tracks[session.id], symbols = track ? Object.keys(track.prices) : []
  if (!symbols.includes(state.symbol)) state.symbol = symbols[0] || ""
  const dark = matchMedia("(prefers-color-scheme: dark)").matches
  const key = [session?.id, track?.key, state.symbol, dark, element.clientWidth, state.hue]
  if (!changed(state.curves, key)) return
  const id = named(), choose = made("select", {id, "data-key": "symbol", onchange: () => { state.symbol = choose.value; pictured(element, state, session, words) }},
    ...symbols.map(each => made("option", {value: each, selected: each === state.symbol}, each)))
  const first = track && track.time.length > 1
  const empty = first ? null : made("p", {class: "quiet"}, words.no_candle)
  replaced(state.curves, card(words.equity, empty, state.equity, made("h3", {}, words.drawdown), state.drawdown),
    card(words.prices, symbols.length > 1 ? made("p", {}, made("label", {for: id}, words.symbol), " ", choose) : made("p", {}, state.symbol),
         state.prices, made("p", {class: "quiet"}, words.fills_are)))
  drawn(element, state, track, words)
}

function stacked(element) { // a table that does not fit into its card is a list
  const cards = [...element.querySelectorAll("section")].filter(each => each.querySelector("table"))
  for (const each of cards) each.classList.remove("stacked")
  const narrow = cards.filter(each => each.clientWidth < 480 || each.querySelector("table").offsetWidth > each.clientWidth - 24) // its padding
  for (const each of narrow) each.classList.add("stacked")
}

function shown(element, state, look, again, send) { // a view
  const words = look.words, session = headed(element, state, look, again, send)
  for (const each of look.sessions) if (each.track) state.tracks[each.id] = each.track
  element.lang = words.locale
  if (changed(state.note, [session?.note, look.unread])) state.note.replaceChildren(
    ...(look.unread ? [made("p", {class: "banner bad"}, `✕ ${look.unread}`)] : []),
    ...(session?.note ? [made("p", {class: "banner"}, session.note)] : []),
    ...(session ? [] : [made("p", {class: "banner"}, words.no_session)]))
  if (changed(state.facts, session?.facts)) state.facts.replaceChildren(...(session?.facts || []).map(([label, text, tone]) =>
    made("div", {class: "fact"}, made("span", {class: "quiet"}, label), made("strong", {class: tone || null}, text))))
  if (changed(state.alerts, look.alerts)) {
    const known = state.open
    state.open = Object.keys(look.alerts.open)
    const fresh = look.alerts.rows.filter(row => known && look.alerts.open[row[0]] && !known.includes(row[0]))
    if (fresh.length) state.news.textContent = fresh.map(row => row.map(each => Array.isArray(each) ? each[0] : each).join(" ")).join(". ")
    replaced(state.alerts, card(look.alerts.title, table(look.alerts, acknowledged(look, send, state.status))))
  }
  pictured(element, state, session, words)
  const parts = [...(session?.parts || []), look.log]
  if (changed(state.parts, parts)) state.parts.replaceChildren(...parts.map(part => card(part.title, table(part))))
  stacked(element)
  if (changed(state.foot, words.foot)) state.foot.replaceChildren(words.foot, " ", made("a", {href: "https://www.tradingview.com/", rel: "noopener noreferrer"}, "TradingView"))
}

export function mount(element, {look, on, send}) {
  const state = skeleton(element)
  let lost = "", since = performance.now()
  const again = () => state.look && shown(element, state, state.look, again, send)
  const tell = () => {
    const late = performance.now() - since, old = Boolean(lost || late > OLD || state.look?.unread)
    element.classList.toggle("old", old)
    const words = state.look?.words, text = !words ? lost : old ? `⚠ ${lost || words.late}. ${words.old} ${state.look.clock}` : `● ${words.live}`
    const now = words && !old ? `${text}, ${state.look.clock}` : text
    state.fresh.classList.toggle("warn", old)
    state.fresh.setAttribute("aria-live", old ? "polite" : "off") // the clock of a view that is new is not read out each second
    if (state.fresh.textContent !== now) state.fresh.textContent = now
  }
  const hear = ({look: next, lost: why}) => {
    lost = why || ""
    if (next) {
      if (!state.look) requestAnimationFrame(() => performance.mark("drawn"))
      state.look = next
      since = performance.now()
      again()
    }
    tell()
  }
  const turned = matchMedia("(prefers-color-scheme: dark)"), resized = new ResizeObserver(again), every = setInterval(tell, 1_000)
  turned.addEventListener("change", again)
  resized.observe(element)
  const off = on(hear)
  if (look && look.words) hear({look})
  return () => {
    clearInterval(every)
    resized.disconnect()
    turned.removeEventListener("change", again)
    for (const each of state.charts) (each.destroy || each.remove).call(each)
    if (off) off()
  }
}

function render({model, el}) { // inside a notebook, by anywidget
  const waiting = new Map()
  const answer = message => waiting.get(message.id)?.(message)
  model.on("msg:custom", answer)
  const send = request => new Promise((done, fail) => {
    const given = setTimeout(() => { waiting.delete(request.id); fail(new Error(model.get("look").words.no_answer)) }, 30_000)
    waiting.set(request.id, message => { clearTimeout(given); waiting.delete(request.id); done(message) })
    model.send(request)
  })
  const on = hear => {
    const news = () => hear({look: model.get("look")})
    model.on("change:look", news)
    return () => { model.off("change:look", news); model.off("msg:custom", answer) }
  }
  return mount(el, {look: model.get("look"), on, send})
}

export default {render}
