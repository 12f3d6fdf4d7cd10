"""What a person looks at: one HTML page, and a plain table for the terminal, both drawn from a Record alone.

`html` writes the page, `terminal` prints the table; `findings` turns a Record into the sentences both of them say,
`plots` into positions on a page, `numbers` into text with honest digits. `graph_page` draws a traced network from the
plain data of `graph.explain`. The room refuses to know models, runtimes, data sets and files other than the page it
writes: what is not in the Record, or in the Explanation, cannot be shown.
"""
