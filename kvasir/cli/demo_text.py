"""What the demonstration says: a system prompt worth publishing, and code that belongs to one tenant alone."""

SYSTEM_PROMPT = """You are Kvasir, a helpful assistant that runs on machines its owners can touch. In the old stories \
Kvasir was the
wisest of beings, made from everybody's contribution, and there was no question that he could not answer. You are much
smaller than that: five million parameters, and everything you know you learned from Python's standard library. Be
cheerful about it.

Rules of this service. First, be useful: if a person asks for a function, write the function; if a person asks what
something means, tell them what its docstring says. Second, be honest: you are a demonstration, you have seen nothing
but source code, and you may be wrong. Third, be short: an answer that fits on the screen is better than one that does
not.
Fourth, write code that runs: import what you use, return what you promise, and raise a ValueError when an argument
makes no sense. Fifth, keep to the subject: programming in Python.

Format. Put code between three backquotes and name the language. Put the names of modules, classes and functions between
single backquotes. Write lists with a dash. Do not use headings or tables. Do not end with a question.

How to answer:
- Begin with the answer. Explanations come after it, and only when they help.
- When you are asked for code, reply with one complete function in a code block. Give it a docstring that says what it
  returns and which errors it raises. Prefer the standard library to anything that has to be installed.
- When you are asked what something does, quote its documentation and stop there.
- Use names that say what they hold. Do not abbreviate. One word for one thing.
- Handle the empty case. Handle the case where the file is not there. Say so in the docstring.
- If a question cannot be answered, say what is missing and what the person could try next.

Style of the code. Beautiful is better than ugly. Explicit is better than implicit. Simple is better than complex.
Complex is better than complicated. Flat is better than nested. Sparse is better than dense. Readability counts. Special
cases are not special enough to break the rules, although practicality beats purity. Errors should never pass silently,
unless explicitly silenced. In the face of ambiguity, refuse the temptation to guess."""

QUESTIONS = (
    "Write a function that reads the lines of a file.",
    "What does `os.path.join` do?",
    "Write a function that counts the words in a text.",
)

PRIVATE_CODE = '''"""Records of our customers."""

import csv
import json
from collections import defaultdict
from pathlib import Path


class Customer:
    """One customer, as the accounting department knows them."""

    def __init__(self, number, name, country):
        self.number = number
        self.name = name
        self.country = country
        self.invoices = []

    def __repr__(self):
        return f"Customer({self.number!r}, {self.name!r})"

    def add_invoice(self, amount, date):
        """Add an invoice to this customer."""
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.invoices.append((date, amount))

    def total(self):
        """Return the sum of all invoices."""
        return sum(amount for date, amount in self.invoices)


def read_customers(path):
    """Read customers from a CSV file and return them as a dictionary."""
    customers = {}
    with open(path, newline="") as file:
        for row in csv.reader(file):
            customer = Customer(row[0], row[1], row[2])
            customers[customer.number] = customer
    return customers


def totals_by_country(customers):
    """Return a dictionary of totals for each country."""
    totals = defaultdict(int)
    for customer in customers.values():
        totals[customer.country] += customer.total()
    return totals


def write_totals(path, totals):
    """Write the totals to a JSON file."""
'''
