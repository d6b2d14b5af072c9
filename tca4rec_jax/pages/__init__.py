"""Pages for people: sections as data, and what makes HTML or Markdown of them."""
