/* Search on pages that are opened from disk. A browser starts no worker there, so the search runs
   in a hidden frame: the same script, another window. On a server the real Worker stays. */
"use strict";

if (location.protocol === "file:") {
  window.Worker = class {
    constructor(address) {
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.title = "search";
      document.body.append(this.frame);
      const inner = this.frame.contentWindow;
      inner.postMessage = (data) => setTimeout(() => this.onmessage?.({ data }));
      const script = inner.document.createElement("script");
      script.src = new URL(address, location.href);
      script.onload = () => {
        this.ready = true;
        this.waiting.splice(0).forEach((data) => this.postMessage(data));
      };
      script.onerror = (event) => this.onerror?.(event);
      inner.document.body.append(script);
    }

    postMessage(data) {
      if (this.ready) this.frame.contentWindow.onmessage({ data });
      else this.waiting.push(data);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
