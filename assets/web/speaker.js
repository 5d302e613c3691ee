/* The browser's own voices, for readers who want to listen. A voice that would send what it speaks to
   another machine is not used. */
"use strict";

/** {node, say(texts, rate), stop(), speaks}. `node` is the button that turns speech on, hidden where
    there is no voice; `changed()` is called when it is pressed. */
Book.speaker = (changed) => {
  const speech = window.speechSynthesis;
  let wanted = false, voice = null, left = 0, turn = 0;
  const node = Book.el("button", { type: "button", class: "walk-button", hidden: "", "aria-pressed": "false", onclick: press }, "Speak");

  function press() {
    wanted = !wanted;
    node.setAttribute("aria-pressed", String(wanted));
    stop();
    changed();
  }

  function find() {
    const own = speech.getVoices().filter((one) => one.localService && one.lang.startsWith("en"));
    voice = own.find((one) => one.default) ?? own[0];
    node.hidden = !voice;
  }
  if (speech) {
    find();
    speech.addEventListener("voiceschanged", find);
  }

  /** Speak texts, a sentence at a time: browsers stop in long ones. */
  function say(texts, rate) {
    stop();
    if (!wanted || !voice) return;
    const mine = turn;
    for (const sentence of texts.flatMap((text) => text.trim().split(/(?<=[.:?!])\s+/)).filter(Boolean)) {
      const words = Object.assign(new SpeechSynthesisUtterance(sentence), { voice, lang: voice.lang, rate });
      words.onend = words.onerror = () => { if (turn === mine) left -= 1; };
      left += 1;
      speech.speak(words);
    }
  }

  function stop() {
    turn += 1;
    left = 0;
    speech?.cancel();
  }

  return { node, say, stop, get speaks() { return left > 0; } };
};
