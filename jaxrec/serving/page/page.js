// The page over the HTTP interface: no library, no build step, nothing from another host.
"use strict";

const $ = (id) => document.getElementById(id);
const random = () => crypto.getRandomValues(new Uint32Array(1))[0].toString(36);
const state = { user: null, offset: 0, asked: 0 };
const seed = random(); // of a guest's lists, so that their pages fit each other
// Kept while the tab is open, and never in an address, which is written down in many places.
let token = sessionStorage.getItem("token") || "";
let asking = null; // the promise of a token, while the page asks for one

async function call(path, body, method) {
  const options = { method: method || (body === undefined ? "GET" : "POST"), headers: {} };
  const sent = token;
  if (sent) options.headers.authorization = `Bearer ${sent}`;
  if (body !== undefined) {
    options.headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const answer = await fetch(path, options);
  if (answer.status === 401) {
    if (sent === token) await askForToken(); // else there is another one meanwhile
    return call(path, body, method);
  }
  const found = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) {
    throw new Error(found && found.error ? found.error : `${path}: ${answer.status}`);
  }
  return found;
}

function askForToken() {
  asking ??= new Promise((resolve) => {
    const before = document.activeElement;
    $("about").close(); // it would keep everybody from the form
    $("token-why").textContent = token ? "The server did not take this token." : "The server wants its token first.";
    $("token-form").hidden = false;
    $("token").focus();
    $("token-form").addEventListener("submit", (event) => {
      event.preventDefault();
      token = $("token").value;
      sessionStorage.setItem("token", token);
      $("token-form").reset();
      $("token-form").hidden = true;
      asking = null;
      (before === document.body ? $("recommended") : before).focus();
      resolve();
    }, { once: true });
  });
  return asking;
}

function guarded(work) {
  return async (event) => {
    if (event) event.preventDefault();
    try {
      $("error").hidden = true;
      await work(event);
    } catch (error) {
      $("error").textContent = error.message;
      $("error").hidden = false;
    }
  };
}

const name = (item) => item.title || String(item.item_id);
const chosen = (id) => Array.from($(id).selectedOptions, (option) => option.value);

function request(version) {
  const filter = {
    any_of: chosen("any-of"),
    none_of: chosen("none-of"),
    max_per_category: Number($("cap").value) || 0,
  };
  if ($("threshold").value !== "") filter.min_score = Number($("threshold").value);
  return {
    user_id: state.user,
    k: Number($("k").value) || 10,
    offset: state.offset,
    diversity: Number($("diversity").value),
    explore: $("explore").checked,
    explore_seed: state.user === null ? seed : "",
    version,
    filter,
  };
}

function button(text, of, work) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.setAttribute("aria-label", `${text}: ${of}`);
  made.addEventListener("click", guarded(work));
  return made;
}

function row(item, answer) {
  const made = $("item").content.firstElementChild.cloneNode(true);
  const title = name(item);
  const chance = item.propensity === null ? [] : [`chance\u00a0${Number((100 * item.propensity).toPrecision(2))}\u00a0%`];
  made.dataset.item = item.item_id;
  made.querySelector(".title").textContent = title;
  made.querySelector(".score").textContent =
    (item.score === null ? chance : [item.score.toFixed(3), ...chance]).join(" · ");
  made.querySelector(".source").textContent = item.source + (item.explored ? ", explored" : "");
  made.querySelector(".reason").textContent = item.reasons.join(" ");
  const actions = made.querySelector(".actions");
  actions.append(
    button("Took it", title, () => took(item, answer)),
    button("Why and similar", title, () => about(item, answer)),
    button("Hide", `${title}, from everybody`, () => hide(item)),
  );
  return made;
}

function fill(id, answer) {
  replaceRows($(id), answer.items.map((item) => row(item, answer)));
}

// Whoever stands on a button of a row stands on that of the row in its place afterwards, not at the page's beginning.
function replaceRows(list, rows) {
  const buttons = (row) => Array.from(row.querySelectorAll("button"));
  const place = Array.from(list.children).findIndex((row) => row.contains(document.activeElement));
  const nth = place < 0 ? place : buttons(list.children[place]).indexOf(document.activeElement);
  list.replaceChildren(...rows);
  if (place < 0) return;
  const there = rows[Math.min(place, rows.length - 1)];
  (there ? buttons(there)[nth] : list.closest("section, dialog").querySelector("h2")).focus();
}

function say(...sentences) {
  const text = sentences.filter(Boolean).join(" ");
  $("status").textContent = text;
  $("about-status").textContent = $("about").open ? text : ""; // what lies behind a dialog is not read out
}

async function recommend(said) {
  const number = ++state.asked;
  const other = $("version-b").value;
  const asked = [call("v1/recommend", request($("version-a").value))];
  if (other) asked.push(call("v1/recommend", request(other)));
  const answers = await Promise.all(asked);
  if (number !== state.asked) return; // a newer question is on its way
  fill("list-a", answers[0]);
  $("list-a").start = $("list-b").start = state.offset + 1;
  $("name-a").textContent = `Model ${answers[0].model_version}`;
  $("column-b").hidden = !other;
  if (other) {
    fill("list-b", answers[1]);
    $("name-b").textContent = `Model ${answers[1].model_version}`;
  }
  const size = answers[0].items.length;
  const where = size ? `Items ${state.offset + 1} to ${state.offset + size}.` : "There is nothing more under these rules.";
  say(said, where, ...answers.flatMap((answer) => answer.notes));
  $("previous").disabled = state.offset === 0;
  $("next").disabled = size < (Number($("k").value) || 10);
}

async function turn(offset) {
  state.offset = offset;
  await recommend();
  $("recommended").focus(); // the button may be disabled now, and the list begins above it
}

async function show(said) {
  const user = state.user;
  const events = user === null ? [] : (await call(`v1/users/${encodeURIComponent(user)}`)).history;
  if (user !== state.user) return; // another one was chosen meanwhile
  $("history-empty").hidden = events.length > 0;
  $("history").replaceChildren(
    ...events.map((event) => {
      const made = document.createElement("li");
      made.textContent = name(event);
      return made;
    }),
  );
  $("history").scrollTop = $("history").scrollHeight;
  await recommend(said);
}

async function took(item, answer) {
  if (state.user === null) invent();
  const event = { user_id: state.user, item_id: item.item_id, version: answer.model_version };
  if (item.propensity !== null) event.propensity = item.propensity;
  await call("v1/feedback", { events: [event] });
  state.offset = 0;
  await show(`${name(item)} is in the history now.`);
}

async function about(item, answer) {
  const [why, similar] = await Promise.all([
    call("v1/explain", { user_id: state.user, item_id: item.item_id, version: answer.model_version }),
    call("v1/similar", { item_id: item.item_id, k: 5 }),
  ]);
  $("about-title").textContent = name(item);
  $("about-model").textContent = [`Model ${why.model_version}.`, ...why.notes].join(" ");
  $("about-reasons").replaceChildren(
    ...why.reasons.map((reason) => {
      const made = document.createElement("li");
      made.textContent = reason;
      return made;
    }),
  );
  $("similar-title").textContent = `Similar, by model ${similar.model_version}`;
  $("about-status").textContent = "";
  fill("similar", similar);
  if (!$("about").open) $("about").showModal();
  $("about-title").focus();
}

async function hide(item) {
  await call("v1/items/hide", { item_id: item.item_id });
  for (const list of [$("found"), $("similar")]) {
    replaceRows(list, Array.from(list.children).filter((row) => row.dataset.item !== String(item.item_id)));
  }
  await recommend(`${name(item)} is hidden now.`);
}

function invent() {
  state.user = `guest-${random()}`;
  $("user").value = state.user;
}

function options(select, values, first) {
  const made = values.map((value) => new Option(value, value));
  select.replaceChildren(...(first === undefined ? [] : [new Option(first, "")]), ...made);
}

async function start() {
  const about = await call("v1/about");
  $("model").textContent =
    `Model ${about.version}, ${about.num_items.toLocaleString()} items` +
    (about.dataset ? ` of ${about.dataset}` : "");
  options($("users"), about.example_users.map(String));
  options($("any-of"), about.categories);
  options($("none-of"), about.categories);
  options($("version-a"), about.versions, "as the server deals them");
  options($("version-b"), about.versions, "nothing");
  $("explore").disabled = !about.explores;
  $("explore-why").hidden = about.explores;
  await show();
}

$("user-form").addEventListener("submit", guarded(async () => {
  state.user = $("user").value.trim() || null;
  state.offset = 0;
  await show();
}));
$("invent").addEventListener("click", guarded(async () => {
  invent();
  state.offset = 0;
  await show();
}));
$("erase").addEventListener("click", guarded(async () => {
  if (state.user === null) return;
  const { erased } = await call(`v1/users/${encodeURIComponent(state.user)}`, undefined, "DELETE");
  state.offset = 0;
  await show(`${erased} events of ${state.user} are forgotten.`);
}));
$("rules-form").addEventListener("submit", (event) => event.preventDefault());
$("rules-form").addEventListener("input", guarded(async () => {
  $("diversity-value").textContent = Number($("diversity").value).toFixed(1);
  state.offset = 0;
  await recommend();
}));
$("search-form").addEventListener("submit", guarded(async () => {
  if (!$("query").value.trim()) return;
  fill("found", await call("v1/search", { query: $("query").value.trim(), user_id: state.user, k: 5 }));
}));
$("add-form").addEventListener("submit", guarded(async () => {
  const title = $("new-title").value.trim();
  if (!title) return;
  const item = { item_id: `new-${random()}`, title };
  await call("v1/items", item);
  $("added").textContent = `${title} is in the catalogue now.`;
  $("new-title").value = "";
  await recommend();
}));
$("previous").addEventListener("click", guarded(() => turn(Math.max(0, state.offset - (Number($("k").value) || 10)))));
$("next").addEventListener("click", guarded(() => turn(state.offset + (Number($("k").value) || 10))));
$("about").addEventListener("close", () => {
  // The browser goes back to the button that opened it, unless the list has been made anew since.
  const focus = document.activeElement;
  if (focus === document.body || $("about").contains(focus)) $("recommended").focus();
});
guarded(start)();
