"""A text of our own that stands before documents while they are read, if they are to be joined, and is dropped then.

A document that is read first is read as if nothing stood before it: some of its pairs say that. One that was read behind other prose says
that something does, whatever it is. What is like the documents serves best (docs/benchmarks.md): so the text is as articles and reports
are, of several subjects, and nobody's. Whoever changes it gives every joinable context a new key.
"""

from __future__ import annotations

PREAMBLE = """\
The Orrin is a river in the eastern lowlands, about 412 kilometres long. It rises on the northern slope of Mount Kessel at a height of
1,870 metres, passes the towns of Velden, Marsh Cross and Tarrow, and reaches the sea near the port of Anmouth. Its largest tributaries
are the Lesser Orrin, which joins it from the left below Velden, and the Sorrel. The basin covers some 18,000 square kilometres, of which
two thirds are used for farming. The name was first recorded in the year 812, in a charter that grants the fishing rights of the upper
valley to an abbey. It is thought to come from an older word for "pale", after the clay that colours the water in spring.

Until the eighteenth century the river could be used by boats only from Tarrow to the sea. A canal with fourteen locks was built between
1764 and 1781 under the engineer Johann Merrick, who had worked on similar projects abroad. It made Velden a centre of the trade in
timber, salt and wool, and the number of its inhabitants grew from about 3,000 to more than 20,000 within sixty years. When the railway
arrived in 1858, most of the traffic moved to it, and the upper canal was closed in 1911. Since the 1970s it has been restored by
volunteers; it is now used by pleasure boats, and its towpath is a protected monument.

The floods of the Orrin are caused by melting snow and usually come in April. The highest one on record occurred in 1845, when the water
stood 4.7 metres above its normal level and 112 people died. After another flood in 1926 the government decided to build two dams, which
were finished in 1934 and 1938. They also provide electricity for around 90,000 households. Biologists have criticised them because salmon
can no longer reach the places where they spawn, although fish ladders were added in 1996. According to a study of 2009, the number of
species in the lower river has increased again, from 19 to 31, mainly because the water is cleaner than it was in the period of heavy
industry.

The University of Tarrow was founded in 1583 by Duke Albrecht IV, and is the second oldest in the country. It began with four faculties,
theology, law, medicine and philosophy, and had fewer than two hundred students until the middle of the seventeenth century. During the
war of 1701 it was closed for six years, and part of its library was taken away; some of the books were returned only in 1923. The main
building, designed by Clara Voss in a classical style, was completed in 1832. Today the university has about 23,000 students, 2,400 of
them from abroad, and eleven faculties. It is financed mostly by the state, while research grants and donations make up about a third of
its budget.

The university is known for its work in physics and in the history of language. In 1897 Henrik Solberg measured the speed of sound in
gases at low pressure there, for which he received several prizes, and in 1931 Maria Lenz described the family of dialects that is now
named after her. Its botanical garden, opened in 1794, has more than 6,000 kinds of plants and is the largest in the region. Among those
who studied at Tarrow are three presidents, the composer Emil Hartmann and the chemist Ada Rowe, who left without a degree in 1905 and
later said that she had learned more in the garden than in the lecture halls. Students' life is organised in about forty societies, the
oldest of which dates from 1790. In contrast to other universities of the country, no fees are charged for a first degree.

Amber is the hardened resin of trees that grew tens of millions of years ago. It is not a mineral, since it is of organic origin and has
no crystal structure. Most pieces are yellow to brown, but white, green and blue ones are also found. It is light enough to float in salt
water, becomes soft at about 150 degrees, and burns with a pleasant smell, which explains its name in several languages. When it is rubbed
it attracts small objects; this property was described in antiquity, and the word "electricity" is derived from the Greek name of the
material. Insects and parts of plants that were enclosed in the resin are of great value to science, because even fine details have been
preserved. Amber has been traded over long distances since the Stone Age, and was used for jewellery, as medicine and as incense. In
modern times large amounts were dug from deposits below the coast, where production reached 500 tonnes a year around 1900. Imitations made
of glass or plastic are common; they can be recognised by their weight, by their temperature on the skin, and by the fact that they do not
float.
"""

#: Tokens of it that are taken: as many as the window has room for.
PREAMBLE_TOKENS = (1024, 512, 256)
