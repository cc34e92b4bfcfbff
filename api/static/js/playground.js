/** The playground: a chat, or a text to be continued. */

import { AnswerView } from "./answer.js";
import { Chat } from "./chat.js";
import { Completion } from "./completion.js";
import { button, byId, h, setText } from "./dom.js";
import { Parameters } from "./parameters.js";
import { Run, isRunning, newAnswer } from "./run.js";
import { Session } from "./session.js";
import { JobStream } from "./stream.js";

const MODES = ["chat", "completion"];
const TALKS = /(^|[-_.])(it|instruct|chat)([-_.]|$)/i; // names of models that were trained to chat

export class Playground {
  #session = new Session();
  #stream = new JobStream();
  #views = new WeakMap(); // AnswerView by answer
  #runs = new Map(); // Run by answer
  #tabs = new Map(); // button by mode
  #panes;
  #mode = null;
  #frame = null;

  constructor() {
    const { state } = this.#session;
    this.parameters = new Parameters(byId("parameters"), state.parameters, () => this.#session.save());
    this.#panes = {
      chat: new Chat(this.#host("chat")),
      completion: new Completion(this.#host("completion")),
    };
    this.#buildPage();
    this.#stream.addEventListener("state", () => this.#showConnection());
    for (const mode of MODES)
      for (const answer of this.#answers(mode)) if (isRunning(answer)) this.#run(answer);
    this.#show(state.mode ?? "chat");
  }

  /** Called when the model is known: what to offer depends on it. */
  setModel(model) {
    const talks = TALKS.test(model.id);
    if (this.#session.state.mode === null) this.#show(talks ? "chat" : "completion");
    const sees = (model.input_modalities ?? []).includes("image");
    this.#panes.chat.setModel({ talks, images: sees ? (model.image_limits ?? {}) : null });
  }

  /** The API key has changed. */
  reconnect() {
    this.#stream.reconnect();
  }

  setMode(mode) {
    this.#session.state.mode = mode;
    this.#session.save();
    this.#show(mode);
  }

  focusInput() {
    this.#panes[this.#mode].focusInput();
  }

  startAnew() {
    this.#panes[this.#mode].clear();
    this.focusInput();
  }

  /** Cancel what runs in the mode that is shown; whether something did. */
  stop() {
    return this.#stop(this.#mode);
  }

  /** What a pane may do. */
  #host(mode) {
    return {
      state: this.#session.state,
      save: () => this.#session.save(),
      /** Submit a job with these fields and the form's; its answer, to be kept in the state. */
      ask: (fields) => this.#ask(fields),
      running: () => this.#answers(mode).some(isRunning),
      stop: () => this.#stop(mode),
      view: (answer, options) => this.#view(answer, options),
      system: () => this.parameters.system,
    };
  }

  #answers(mode) {
    const { messages, completion } = this.#session.state;
    const answers = mode === "chat" ? messages.map((message) => message.answer) : [completion];
    return answers.filter(Boolean);
  }

  #ask(fields) {
    this.parameters.showError(null);
    const answer = newAnswer({ ...fields, ...this.parameters.body() });
    this.#run(answer);
    return answer;
  }

  #run(answer) {
    this.#runs.set(answer, new Run(answer, this.#stream, () => this.#changed(answer)));
  }

  #stop(mode) {
    const running = this.#answers(mode).filter(isRunning);
    for (const answer of running) this.#runs.get(answer).stop();
    return running.length > 0;
  }

  #view(answer, options) {
    if (!this.#views.has(answer)) this.#views.set(answer, new AnswerView(answer, options));
    return this.#views.get(answer);
  }

  #changed(answer) {
    this.#session.save();
    this.#views.get(answer)?.update();
    this.#drawSoon();
    if (isRunning(answer)) return;
    this.#runs.delete(answer);
    if (answer.status === "failed") this.parameters.showError(answer.error);
  }

  /** Once a frame, however many tokens come in it. */
  #drawSoon() {
    this.#frame ??= requestAnimationFrame(() => {
      this.#frame = null;
      this.#panes[this.#mode].update();
      this.#showConnection();
    });
  }

  #buildPage() {
    const labels = { chat: "Chat", completion: "Completion" };
    for (const mode of MODES) {
      this.#tabs.set(
        mode,
        h("button", { type: "button", on: { click: () => this.setMode(mode) } }, labels[mode]),
      );
    }
    const fresh = button("Start anew", {
      icon: "new",
      class: "quiet",
      on: { click: () => this.startAnew() },
    });
    this.connection = h("p", { class: "notice", role: "status", hidden: true });
    byId("conversation").append(
      h(
        "div",
        { class: "bar-line" },
        h("div", { class: "segmented", role: "group", "aria-label": "Mode" }, [...this.#tabs.values()]),
        fresh,
      ),
      this.connection,
      ...MODES.map((mode) => this.#panes[mode].element),
    );
  }

  #show(mode) {
    this.#mode = mode;
    this.parameters.setMode(mode);
    for (const name of MODES) {
      this.#panes[name].element.hidden = name !== mode;
      this.#tabs.get(name).setAttribute("aria-pressed", String(name === mode));
    }
    this.#panes[mode].update();
  }

  #showConnection() {
    const running = MODES.some((mode) => this.#answers(mode).some(isRunning));
    const lost = running && !this.#stream.connected;
    this.connection.hidden = !lost;
    setText(
      this.connection,
      lost ? "Connection lost. The job goes on; reconnecting to take it up where it was." : "",
    );
  }
}
