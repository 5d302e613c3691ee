/* Search on pages that are opened from disk. A browser starts no worker there, so the search runs
   in a hidden frame: the same script, another window. It is made when a reader opens the search, as
   a page that is only read needs none. On a server the real Worker stays. */
"use strict";

if (location.protocol === "file:") {
  window.Worker = class {
    constructor(address) {
      this.address = new URL(address, location.href);
      this.waiting = [];
      const asked = (event) => {
        if (event.key ? !"kfs/".includes(event.key) : !event.target.closest(".md-search, [for=__search]")) return;
        ["keydown", "click"].forEach((kind) => document.removeEventListener(kind, asked, true));
        if (!this.ended) this.start();
      };
      ["keydown", "click"].forEach((kind) => document.addEventListener(kind, asked, true));
    }

    start() {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.title = "search";
      document.body.append(this.frame);
      const inner = this.frame.contentWindow;
      inner.postMessage = (data) => this.deliver(() => this.onmessage, data);
      const script = inner.document.createElement("script");
      script.src = this.address;
      script.onload = () => {
        this.ready = true;
        this.waiting.splice(0).forEach((data) => this.postMessage(data));
      };
      script.onerror = (event) => this.onerror?.(event);
      inner.document.body.append(script);
    }

    postMessage(data) {
      if (this.ready) this.deliver(() => this.frame.contentWindow?.onmessage, data);
      else this.waiting.push(data);
    }

    /** Later, and as a copy: each side may change what it has. */
    deliver(to, message) {
      const data = structuredClone(message);
      setTimeout(() => to()?.({ data }));
    }

    terminate() {
      this.ended = true;
      this.frame?.remove();
    }
  };
}
