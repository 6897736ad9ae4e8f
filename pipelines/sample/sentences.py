"""Sentence patterns in English, German and French: the three texts of a pattern are translations of each other.

Slots that agree with the noun come from `Noun.slots`; `feature` is the form behind `is`, `featured` the form beside the
noun; a slot written with a capital is capitalised. Verbs and pronouns are chosen so that one pattern fits every noun.
"""

from __future__ import annotations

from pipelines.sample.vocabulary import Texts

# Neighbours differ in words, so that the next pattern of a list is always another title.
TITLES: tuple[Texts, ...] = (
    ("{Featured} {Noun}", "{Featured} {noun}", "{Noun} {featured}"),
    ("{Material} {Noun}", "{Noun} aus {material}", "{Noun} en {material}"),
    ("{Noun}", "{Noun}", "{Noun}"),
    ("{Featured} {Material} {Noun}", "{Featured} {noun} aus {material}", "{Noun} {featured} en {material}"),
)

# What follows the model name, for the title of the same number.
ENDINGS: tuple[Texts, ...] = (
    (", {color}", ", {color}", ", {color}"),
    (" – {color}", " – {color}", " – {color}"),
    (" ({color}, {material})", " ({color}, {material})", " ({color}, {material})"),
    ("", "", ""),
)

# The whole description of a product that nobody took time for.
SHORT_OPENERS: tuple[Texts, ...] = (
    ("{Feature}, made of {material}.", "{Feature}, aus {material}.", "{Feature}, en {material}."),
    ("In {material} and {feature}.", "Aus {material} und {feature}.", "En {material} et {feature}."),
    ("{Noun} in {material}, {feature}.", "{Noun} aus {material}, {feature}.", "{Noun} en {material}, {feature}."),
)

OPENERS: tuple[Texts, ...] = (
    (
        "{This} {is} {feature}, made of {material} and built for everyday use.",
        "{This} {is} {feature}, aus {material} gefertigt und für jeden Tag gemacht.",
        "{This} {is} {feature}, fabriqué{e} en {material} et pensé{e} pour tous les jours.",
    ),
    (
        "Made of {material}, {this} {is} {feature} and a pleasure to use.",
        "Aus {material} gefertigt, {is} {this} {feature} und angenehm im Gebrauch.",
        "Fabriqué{e} en {material}, {this} {is} {feature} et agréable{pl} à utiliser.",
    ),
    (
        "{Noun} in {material}: {feature}, well finished and made to last.",
        "{Noun} aus {material}: {feature}, sauber verarbeitet und langlebig.",
        "{Noun} en {material} : {feature}, bien fini{e} et durable{pl}.",
    ),
    (
        "{This} combine{s} {material} with a simple, practical design and {is} {feature} in daily use.",
        "{This} {is} schlicht und praktisch gestaltet, besteh{t} aus {material} und {is} im Alltag {feature}.",
        "{This} associe{nt} simplicité et sens pratique, en {material}, et {is} {feature} au quotidien.",
    ),
    (
        "An everyday companion: {this} {is} {feature} and made entirely of {material}.",
        "Ein Begleiter für jeden Tag: {this} {is} {feature} und vollständig aus {material}.",
        "Un allié de tous les jours : {this} {is} {feature} et entièrement en {material}.",
    ),
    (
        "{Feature} and reliable: {this} made of {material} fit{s} into any day.",
        "{Feature} und zuverlässig: {this} aus {material} pass{t} in jeden Tag.",
        "{Feature} et fiable{pl} : {this} en {material} accompagne{nt} chaque journée.",
    ),
)

# True of anything in the shop. With five sentences about the category there are 23 to choose from, a prime number,
# so that stepping through them by any step repeats none.
GENERAL: tuple[Texts, ...] = (
    (
        "The {material} keeps its shape and its look, even after years of use.",
        "Das Material – {material} – behält auch nach Jahren Form und Aussehen.",
        "La matière choisie – {material} – garde sa forme et son aspect pendant des années.",
    ),
    (
        "The color, {color}, goes with almost everything.",
        "Der Farbton {color} passt zu fast allem.",
        "Le coloris {color} se marie avec presque tout.",
    ),
    (
        "{brand} has tested every detail in daily use.",
        "{brand} hat jedes Detail im Alltag erprobt.",
        "{brand} a testé chaque détail au quotidien.",
    ),
    (
        "If something breaks, our workshop repairs it at a fair price.",
        "Geht etwas kaputt, repariert es unsere Werkstatt zu einem fairen Preis.",
        "En cas de casse, notre atelier répare à un prix juste.",
    ),
    (
        "It ships in a plastic-free box made from recycled paper.",
        "Der Versand erfolgt plastikfrei in einem Karton aus Altpapier.",
        "L'envoi se fait sans plastique, dans un carton en papier recyclé.",
    ),
    (
        "Not what you expected? Returns are free of charge within 30 days.",
        "Doch nicht das Richtige? Die Rückgabe ist innerhalb von 30 Tagen kostenlos.",
        "Pas convaincu ? Le retour est gratuit sous 30 jours.",
    ),
    (
        "{This} {has} been among our bestsellers for several seasons.",
        "{This} gehör{t} seit mehreren Saisons zu unseren Verkaufsschlagern.",
        "{This} figure{nt} depuis plusieurs saisons parmi nos meilleures ventes.",
    ),
    (
        "Clean edges, careful finishing and a calm design make the difference.",
        "Saubere Kanten, sorgfältige Verarbeitung und eine ruhige Gestaltung machen den Unterschied.",
        "Des bords nets, une finition soignée et des lignes sobres font la différence.",
    ),
    (
        "Customers praise the fair balance of price and quality.",
        "Kundinnen und Kunden loben das faire Verhältnis von Preis und Qualität.",
        "Les clients apprécient le juste rapport entre prix et qualité.",
    ),
    (
        "You notice it quickly in daily use: {it} {is} really {feature}.",
        "Im Alltag zeigt sich schnell: {it} {is} wirklich {feature}.",
        "Au quotidien, on le remarque vite : {it} {is} vraiment {feature}.",
    ),
    (
        "Please read the care instructions before the first use.",
        "Bitte vor dem ersten Gebrauch die Pflegehinweise lesen.",
        "Avant la première utilisation, lisez les consignes d'entretien.",
    ),
    (
        "A thoughtful gift for people who value things that last.",
        "Ein durchdachtes Geschenk für alle, die langlebige Dinge schätzen.",
        "Un cadeau bien pensé pour celles et ceux qui aiment les objets durables.",
    ),
    (
        "Designed in a small studio and made in limited batches.",
        "Entworfen in einem kleinen Atelier und in begrenzter Stückzahl gefertigt.",
        "La conception vient d'un petit atelier, la production se fait en séries limitées.",
    ),
    (
        "The combination of {material} and {color} looks timeless.",
        "Die Verbindung von {material} und dem Farbton {color} wirkt zeitlos.",
        "L'association de la matière ({material}) et du coloris {color} reste intemporelle.",
    ),
    (
        "{This} come{s} ready to use, with no extra parts needed.",
        "{This} {is} sofort einsatzbereit, weiteres Zubehör ist nicht nötig.",
        "{This} {is} prêt{e} à l'emploi, sans accessoire supplémentaire.",
    ),
    (
        "At {brand}, every batch is checked by hand before it leaves the workshop.",
        "Bei {brand} wird jede Charge von Hand geprüft, bevor sie die Werkstatt verlässt.",
        "Chez {brand}, chaque lot est contrôlé à la main avant de quitter l'atelier.",
    ),
    (
        "The {material} comes from suppliers that we visit every year.",
        "Das Material ({material}) stammt von Lieferanten, die wir jedes Jahr besuchen.",
        "La matière ({material}) provient de fournisseurs que nous visitons chaque année.",
    ),
    (
        "If you are unsure between two versions, our team will gladly advise you by phone or by mail.",
        "Wer zwischen zwei Ausführungen schwankt, wird von uns gern am Telefon oder schriftlich beraten.",
        "Si vous hésitez entre deux versions, notre équipe vous conseille volontiers par téléphone ou par courriel.",
    ),
)
