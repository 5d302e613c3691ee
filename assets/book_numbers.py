"""The numbers that the book's widgets draw: {name of the file: function that computes them}.

Each widget has a file `numbers_….py` of its own. What a function returns is written as JSON; in a
page it is `Book.data[name]`.
"""

import numbers_mistakes
import numbers_pipelines

DATA = {"mistakes": numbers_mistakes.mistakes, "pipelines": numbers_pipelines.pipelines}
