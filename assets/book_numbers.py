"""The numbers that the book's widgets draw: {name of the file: function that computes them}.

Each widget has a file `numbers_….py` of its own. What a function returns is written as JSON; in a
page it is `Book.data[name]`.
"""

import numbers_pipelines

DATA = {"pipelines": numbers_pipelines.pipelines}
