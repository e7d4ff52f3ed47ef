// The page over the HTTP interface: no library, no build step, nothing from another host.
"use strict";

const $ = (id) => document.getElementById(id);
const state = { user: null, offset: 0, asked: 0 };

async function call(path, body, method) {
  const options = { method: method || (body === undefined ? "GET" : "POST"), headers: {} };
  if (body !== undefined) {
    options.headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const answer = await fetch(path, options);
  const found = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) {
    throw new Error(found && found.error ? found.error : `${path}: ${answer.status}`);
  }
  return found;
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
    version,
    filter,
  };
}

function button(text, label, work) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", guarded(work));
  return made;
}

function row(item, answer) {
  const made = $("item").content.firstElementChild.cloneNode(true);
  const title = item.title || String(item.item_id);
  made.dataset.item = item.item_id;
  made.querySelector(".title").textContent = title;
  made.querySelector(".score").textContent = item.score === null ? "" : item.score.toFixed(3);
  made.querySelector(".source").textContent = item.source + (item.explored ? ", explored" : "");
  made.querySelector(".reason").textContent = item.reasons.join(" ");
  const actions = made.querySelector(".actions");
  actions.append(
    button("Took it", `Took ${title}`, () => took(item, answer)),
    button("Why, and what is similar", `Why ${title}, and what is similar`, () => about(item)),
    button("Hide", `Hide ${title} from everybody`, () => hide(item)),
  );
  return made;
}

function fill(id, answer) {
  $(id).replaceChildren(...answer.items.map((item) => row(item, answer)));
}

async function recommend() {
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
  const notes = answers.flatMap((answer) => answer.notes);
  $("status").textContent = [`${answers[0].items.length} items.`, ...notes].join(" ");
  $("previous").disabled = state.offset === 0;
  $("next").disabled = answers[0].items.length < (Number($("k").value) || 10);
}

async function show() {
  let events = [];
  if (state.user !== null) events = (await call(`v1/users/${encodeURIComponent(state.user)}`)).history;
  $("history-empty").hidden = events.length > 0;
  $("history").replaceChildren(
    ...events.map((event) => {
      const made = document.createElement("li");
      made.textContent = event.title || String(event.item_id);
      return made;
    }),
  );
  $("history").scrollTop = $("history").scrollHeight;
  await recommend();
}

async function took(item, answer) {
  if (state.user === null) invent();
  const event = { user_id: state.user, item_id: item.item_id, version: answer.model_version };
  if (item.propensity !== null) event.propensity = item.propensity;
  await call("v1/feedback", { events: [event] });
  state.offset = 0;
  await show();
  $("status").textContent = `${item.title || item.item_id} is in the history now. ` + $("status").textContent;
}

async function about(item) {
  const [why, similar] = await Promise.all([
    call("v1/explain", { user_id: state.user, item_id: item.item_id }),
    call("v1/similar", { item_id: item.item_id, k: 5 }),
  ]);
  $("about-title").textContent = item.title || String(item.item_id);
  $("about-reasons").replaceChildren(
    ...why.reasons.map((reason) => {
      const made = document.createElement("li");
      made.textContent = reason;
      return made;
    }),
  );
  fill("similar", similar);
  $("about").showModal();
}

async function hide(item) {
  await call("v1/items/hide", { item_id: item.item_id });
  await recommend();
}

function invent() {
  state.user = "guest-" + crypto.getRandomValues(new Uint32Array(1))[0].toString(36);
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
  await call(`v1/users/${encodeURIComponent(state.user)}`, undefined, "DELETE");
  await show();
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
  const item = { item_id: "new-" + crypto.getRandomValues(new Uint32Array(1))[0].toString(36), title };
  await call("v1/items", item);
  $("added").textContent = `${title} is in the catalogue now.`;
  $("new-title").value = "";
  await recommend();
}));
$("previous").addEventListener("click", guarded(async () => {
  state.offset = Math.max(0, state.offset - (Number($("k").value) || 10));
  await recommend();
}));
$("next").addEventListener("click", guarded(async () => {
  state.offset += Number($("k").value) || 10;
  await recommend();
}));
guarded(start)();
