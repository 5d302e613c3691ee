/* The walk player: a step's code, written item by item as its lesson explains it.

   What a film may rely on. Load core.js, this file and data/walk_N.js (N: the number of the step).

     const view = Book.walk.view(Book.data.walk_5, "README.md", { width: 1920, height: 1000, font: 20 });

   view.node         an element of that size: tabs and code, and beside it (under it where `width` is
                     less than 960) the caption. Pixels; `font` is the size of the code's letters.
                     With `caption: "none"` there is no caption, and the code has the whole width.
                     It needs web/book.css, and stands in an element of the class `widget`.
   view.steps        how many items the page has
   view.item(step)   item `step`, counted from 0: {number, title, milestone, milestone_title, page,
                     explanation (HTML), pieces: [{file, name, …}], …}
   view.seconds(step)  how long this item should take where nobody speaks
   view.seek(time)   show a moment; time goes from 0 to `steps`. Between step and step + 1, item `step`
                     is written: at step + share its lines stand there as far as `share` (0 to 1) of
                     its time has gone, in shots: each piece of the item is scrolled to, lit, and typed
                     in the first two thirds of its part of the time. At step + 1 the item is whole.
                     At 0 the code is that of the step before (on later pages: of the pages before).
   view.changes(step)  the shares (0 to 1, ascending, with 0 and 1) at which the picture changes while
                     item `step` is written: between two of them it stays the same. The caption is the
                     same all along, unless it is longer than its box: then it scrolls at these shares.

   The picture depends on `data`, `page`, `size` and `time` alone. */
"use strict";

Book.walk = {
  view() {
    throw new Error("not there yet");
  },
};
