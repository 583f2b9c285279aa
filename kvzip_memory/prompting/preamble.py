"""A text of our own that stands before documents while they are read, if they are to be joined, and is dropped then.

A document that is read first is read as if nothing stood before it: some of its pairs say that. One that was read behind other prose says
that something does, whatever it is. So the text is plain, of several subjects, and nobody's. Whoever changes it gives every joinable
context a new key.
"""

from __future__ import annotations

PREAMBLE = """\
The ferry leaves the harbour at seven in the morning and again at noon. On the way across, passengers can see the old quarry, a row of
white houses, and, if the weather is clear, the hills on the other side of the bay. The crossing takes forty minutes. Bicycles travel free
of charge, but dogs need a ticket, which is sold on board. In winter there is only one boat a day, and when the wind is strong it does not
sail at all. The people of the island have learned to keep a week of food in the house.

Bread needs four things: flour, water, salt and time. The flour takes up the water slowly, and while the dough rests it becomes smooth and
easy to stretch. A little yeast is enough if one is patient, since it grows through the night. In the morning the dough has doubled. It is
folded, shaped and left again until it springs back when it is touched. The oven should be as hot as it can be for the first ten minutes,
with a dish of water below to keep the crust soft, and then cooler until the loaf sounds hollow. Cutting it while it is warm is tempting,
but the crumb is better after an hour.

In the middle of the nineteenth century most towns of the region had no clean water. Wells were dug close to the houses, and what people
threw away found its way into them. Several outbreaks of disease followed one another before the councils agreed to build a system of
pipes from the lakes in the north. The work took eleven years and cost twice what had been planned. Some landowners refused to let the
pipes pass, and a court had to decide. When the first fountain was opened on the market square, a band played, and the mayor drank the
first glass. Within a few years the number of deaths had fallen by half.

A simple lens bends light because glass slows it down. Rays that arrive at an angle change their direction at the surface, and again when
they leave. If the surface is curved in the right way, all rays from one point meet again in another point behind the lens, and there an
image appears, upside down. The shorter the distance at which this happens, the stronger the lens. Two lenses together can correct each
other's faults, which is why a good camera has many of them. The human eye does the same with a single soft lens, whose shape small
muscles change; with age it becomes stiff, and people hold the newspaper farther away.

The committee met on a Thursday. It had to decide whether the library should stay open in the evening. Some members pointed out that the
building was almost empty after six, while the cost of heating had risen. Others answered that those who came were the ones who had nowhere
else to read: students, people who worked during the day, and a few who were simply lonely. A compromise was found. The library would stay
open on two evenings a week, and volunteers would look after the lending desk. After a year the numbers would be counted, and the question
would be asked again.

Birds that travel long distances find their way by several signs at once. Young ones seem to inherit a direction and a distance, and fly on
their own without ever having seen the place where they will spend the winter. Older ones know landmarks, rivers and coasts, and correct
their course when the wind has carried them aside. At night some species watch the stars around which the sky appears to turn. There is good
evidence that they also feel the magnetic field of the earth, although it is still debated with which organ. When clouds hide the sky for
days, many of them wait.

The contract between the two firms was short. One would deliver the parts by the first of each month, and the other would pay within thirty
days. If a delivery was late, the price was reduced by one per cent for each week, but never by more than ten. Either side could end the
agreement with three months' notice. Nothing was said about what should happen if the factory burned down, and in the third year it did.
The lawyers wrote letters for a while. In the end the owners had lunch together, agreed to share the loss, and went on as before.

A chess player who looks at a board for five seconds can often set it up again from memory, if the position is one that could arise in a
game. If the pieces have been placed at random, the master remembers no more of them than a beginner does. What the expert has learned is
not a better memory but thousands of familiar groups, each of which counts as one thing. Musicians read a score in this way, doctors an
image, and drivers a busy street. It takes years to build such a store, and nobody can say afterwards when a particular piece was added.

It had rained for three days, and the path along the stream was soft. They walked in single file without talking much. At the bridge the
older of the two stopped and looked at the water, which was brown and carried branches. He said that it would be over the meadow by evening.
They turned back, fetched the sheep from the lower field and drove them up to the barn. By the time they had finished it was dark. Somebody
had lit the stove, and there was soup. In the night they heard the stream, and in the morning the meadow was a lake.
"""

#: Tokens of it that are taken: as many as the window has room for.
PREAMBLE_TOKENS = (1024, 512, 256)
