"""Five sentences for every category, in three languages."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.sample.vocabulary import Texts

STORIES: Mapping[str, tuple[Texts, Texts, Texts, Texts, Texts]] = {
    "Shoes": (
        (
            "The sole grips on wet stone as well as on dry forest paths, and it can be replaced when it is worn.",
            "Die Sohle greift auf nassem Stein ebenso wie auf trockenem Waldboden und lässt sich austauschen, wenn sie abgelaufen ist.",
            "La semelle accroche sur la pierre mouillée comme sur les sentiers secs, et se remplace quand elle est usée.",
        ),
        (
            "A roomy toe box leaves space for thick socks.",
            "Der weite Zehenraum lässt Platz für dicke Socken.",
            "L'avant large laisse de la place pour des chaussettes épaisses.",
        ),
        (
            "They run slightly small, so please take one size more if you are between two sizes.",
            "Sie fallen etwas klein aus, bei Zwischengrößen empfehlen wir die nächste Größe.",
            "Le modèle taille un peu petit : entre deux pointures, choisissez la plus grande.",
        ),
        (
            "The insole can be taken out, washed and dried overnight.",
            "Die Innensohle lässt sich herausnehmen, waschen und über Nacht trocknen.",
            "La semelle intérieure se retire, se lave et sèche en une nuit.",
        ),
        (
            "After a long day the heel is still well supported, without any pressure on the ankle.",
            "Auch nach einem langen Tag bleibt die Ferse gut gestützt, ohne Druck am Knöchel.",
            "Après une longue journée, le talon reste bien maintenu, sans pression sur la cheville.",
        ),
    ),
    "Clothing": (
        (
            "Flat seams do not rub, not even under a heavy backpack.",
            "Flache Nähte scheuern nicht, auch nicht unter einem schweren Rucksack.",
            "Les coutures plates ne frottent pas, même sous un sac à dos chargé.",
        ),
        (
            "Machine wash at 30 degrees, inside out, and hang it up to dry.",
            "Auf links bei 30 Grad in der Maschine waschen und an der Luft trocknen.",
            "Lavage en machine à 30 degrés, sur l'envers, puis séchage à l'air libre.",
        ),
        (
            "The cut follows the body and still leaves room to move.",
            "Der Schnitt folgt dem Körper und lässt trotzdem Bewegungsfreiheit.",
            "La coupe suit le corps tout en laissant une grande liberté de mouvement.",
        ),
        (
            "Dyed without harmful substances and tested by an independent laboratory.",
            "Ohne Schadstoffe gefärbt und von einem unabhängigen Labor geprüft.",
            "Teinture sans substances nocives, contrôlée par un laboratoire indépendant.",
        ),
        (
            "Right for summer days, and as a layer under a coat when it gets colder.",
            "Richtig für Sommertage, und als Schicht unter dem Mantel, wenn es kälter wird.",
            "Un bon choix pour l'été, et en couche intermédiaire sous un manteau quand il fait plus froid.",
        ),
    ),
    "Camping": (
        (
            "It packs down small and fits into every side pocket of a larger pack.",
            "Klein zusammengelegt passt alles in die Seitentasche eines größeren Rucksacks.",
            "Une fois replié, l'ensemble tient dans la poche latérale d'un grand sac.",
        ),
        (
            "Tested for a week in wind and rain on the Norwegian coast.",
            "Eine Woche lang bei Wind und Regen an der norwegischen Küste erprobt.",
            "Nos essais ont duré une semaine, dans le vent et la pluie de la côte norvégienne.",
        ),
        (
            "Loops on all sides make it easy to hang up, tie down or carry.",
            "Schlaufen an allen Seiten erleichtern das Aufhängen, Abspannen und Tragen.",
            "Des boucles sur tous les côtés facilitent l'accrochage, l'arrimage et le transport.",
        ),
        (
            "A repair patch and a small tube of glue are in the bag.",
            "Ein Flicken und eine kleine Tube Kleber liegen im Beutel.",
            "Une pièce de réparation et un petit tube de colle sont dans la housse.",
        ),
        (
            "Set up in a few minutes, even with cold hands and in the dark.",
            "In wenigen Minuten aufgebaut, auch mit kalten Händen und im Dunkeln.",
            "Mise en place en quelques minutes, même les mains froides et dans le noir.",
        ),
    ),
    "Cycling": (
        (
            "Fits almost every frame and every handlebar from 22 to 32 mm.",
            "Passt an fast jeden Rahmen und an Lenker von 22 bis 32 mm.",
            "Compatible avec presque tous les cadres et les guidons de 22 à 32 mm.",
        ),
        (
            "Nothing rattles, not even on cobblestones.",
            "Nichts klappert, auch nicht auf Kopfsteinpflaster.",
            "Rien ne vibre, même sur les pavés.",
        ),
        (
            "Screws and a hex key are included, and fitting takes less than ten minutes.",
            "Schrauben und Inbusschlüssel liegen bei, die Montage dauert keine zehn Minuten.",
            "Les vis et une clé hexagonale sont fournies, la pose prend moins de dix minutes.",
        ),
        (
            "Salt, rain and road dirt leave no trace on the surface.",
            "Salz, Regen und Straßenschmutz hinterlassen keine Spuren auf der Oberfläche.",
            "Le sel, la pluie et la boue ne laissent aucune trace sur la surface.",
        ),
        (
            "Made for the daily ride to work and just as good for a tour of several weeks.",
            "Gemacht für den täglichen Weg zur Arbeit und ebenso gut für eine mehrwöchige Reise.",
            "Pour le trajet quotidien comme pour un voyage de plusieurs semaines.",
        ),
    ),
    "Kitchen": (
        (
            "Suitable for gas, electric and induction stoves as well as for the oven up to 220 degrees.",
            "Geeignet für Gas, Elektro und Induktion sowie für den Backofen bis 220 Grad.",
            "Convient au gaz, à l'électrique, à l'induction et au four jusqu'à 220 degrés.",
        ),
        (
            "The rim pours without dripping.",
            "Der Rand gießt, ohne zu tropfen.",
            "Le bord verse sans goutter.",
        ),
        (
            "From the kitchen straight to the table, where it looks just as good.",
            "Vom Herd direkt auf den Tisch, wo alles ebenso gut aussieht.",
            "De la cuisine directement à la table, avec la même élégance.",
        ),
        (
            "Free of harmful coatings and neutral in taste.",
            "Frei von schädlichen Beschichtungen und geschmacksneutral.",
            "Sans revêtement nocif et neutre au goût.",
        ),
        (
            "Soak it in warm water for ten minutes and even burnt leftovers come off easily.",
            "Zehn Minuten in warmem Wasser einweichen, und selbst Angebranntes löst sich leicht.",
            "Dix minutes de trempage dans l'eau chaude, et même les restes brûlés se détachent facilement.",
        ),
    ),
    "Furniture": (
        (
            "Felt pads under the feet protect wooden floors.",
            "Filzgleiter unter den Füßen schonen Holzböden.",
            "Des patins en feutre sous les pieds protègent les parquets.",
        ),
        (
            "The surface is treated with natural oil and can be sanded and renewed at home.",
            "Die Oberfläche ist mit Naturöl behandelt und lässt sich zu Hause abschleifen und erneuern.",
            "La surface, traitée à l'huile naturelle, peut être poncée et rénovée chez soi.",
        ),
        (
            "Delivered to the room of your choice by two people.",
            "Lieferung durch zwei Personen bis in den Wunschraum.",
            "Livraison par deux personnes dans la pièce de votre choix.",
        ),
        (
            "Every piece has its own grain, so small differences from the picture are part of the charm.",
            "Jedes Stück hat seine eigene Maserung, kleine Abweichungen vom Bild gehören zum Charakter.",
            "Chaque pièce a son propre veinage : de légères différences avec la photo font partie de son charme.",
        ),
        (
            "Rounded corners make it a good choice for homes with small children.",
            "Abgerundete Ecken machen das Stück zu einer guten Wahl für Familien mit kleinen Kindern.",
            "Les angles arrondis conviennent bien aux foyers avec de jeunes enfants.",
        ),
    ),
    "Bedding": (
        (
            "The fabric is woven tightly and gets softer with every wash.",
            "Der Stoff ist dicht gewebt und wird mit jeder Wäsche weicher.",
            "Le tissu, serré, devient plus doux à chaque lavage.",
        ),
        (
            "Hidden buttons keep everything in place through the night.",
            "Verdeckte Knöpfe halten die ganze Nacht alles an seinem Platz.",
            "Des boutons cachés maintiennent le tout en place pendant la nuit.",
        ),
        (
            "Cool in summer and cosy in winter, it suits every season.",
            "Im Sommer kühl und im Winter behaglich: passend für jede Jahreszeit.",
            "De la fraîcheur en été, de la chaleur en hiver : le confort en toute saison.",
        ),
        (
            "It dries quickly on the line and hardly needs ironing.",
            "Trocknet schnell auf der Leine und muss kaum gebügelt werden.",
            "Séchage rapide sur le fil et presque pas de repassage.",
        ),
        (
            "Made without chlorine and optical brighteners, which sensitive skin will appreciate.",
            "Ohne Chlor und optische Aufheller hergestellt, was empfindliche Haut zu schätzen weiß.",
            "Sans chlore ni azurants optiques, ce que les peaux sensibles apprécieront.",
        ),
    ),
    "Lighting": (
        (
            "The light falls softly and evenly, without hard shadows on the wall.",
            "Das Licht fällt weich und gleichmäßig, ohne harte Schatten an der Wand.",
            "La lumière est douce et régulière, sans ombres dures sur le mur.",
        ),
        (
            "A bulb with an E27 socket is included.",
            "Ein Leuchtmittel mit E27-Sockel liegt bei.",
            "Une ampoule à culot E27 est fournie.",
        ),
        (
            "The fabric cable is three metres long and can be shortened by an electrician.",
            "Das Textilkabel ist drei Meter lang und kann von einer Fachkraft gekürzt werden.",
            "Le câble textile mesure trois mètres et peut être raccourci par un électricien.",
        ),
        (
            "Over a table, beside the sofa or in the hall, it sets the mood at once.",
            "Ob über dem Tisch, neben dem Sofa oder im Flur: Die Stimmung ist sofort eine andere.",
            "Au-dessus d'une table, près du canapé ou dans l'entrée, l'ambiance change aussitôt.",
        ),
        (
            "The switch works silently and remembers the last setting.",
            "Der Schalter arbeitet lautlos und merkt sich die letzte Einstellung.",
            "L'interrupteur est silencieux et garde en mémoire le dernier réglage.",
        ),
    ),
    "Audio": (
        (
            "Voices sound clear and basses stay dry, even at high volume.",
            "Stimmen klingen klar und Bässe bleiben trocken, auch bei hoher Lautstärke.",
            "Les voix sont claires et les basses restent sèches, même à fort volume.",
        ),
        (
            "A full charge lasts for a whole working week.",
            "Eine Akkuladung reicht für eine ganze Arbeitswoche.",
            "Une charge complète tient toute une semaine de travail.",
        ),
        (
            "Cables, feet and covers can be bought separately and changed without special tools.",
            "Kabel, Füße und Abdeckungen sind einzeln erhältlich und ohne Spezialwerkzeug zu wechseln.",
            "Les câbles, les pieds et les caches se vendent séparément et se changent sans outil spécial.",
        ),
        (
            "Tuned by ear in a real living room, not in an empty laboratory.",
            "In einem echten Wohnzimmer nach Gehör abgestimmt, nicht in einem leeren Labor.",
            "Réglage à l'oreille dans un vrai salon, et non dans un laboratoire vide.",
        ),
        (
            "The controls have a fine click and can be found without looking.",
            "Die Regler rasten fein ein und lassen sich blind bedienen.",
            "Les commandes, au cran précis, se trouvent sans regarder.",
        ),
    ),
    "Office": (
        (
            "Cables disappear at the back and the desk stays tidy.",
            "Kabel verschwinden nach hinten und der Tisch bleibt aufgeräumt.",
            "Les câbles disparaissent à l'arrière et le bureau reste rangé.",
        ),
        (
            "It takes little space and suits left-handed and right-handed people alike.",
            "Braucht wenig Platz und eignet sich für Links- und Rechtshänder.",
            "Peu de place suffit, pour les gauchers comme pour les droitiers.",
        ),
        (
            "Hours of typing and reading become noticeably easier on neck and wrists.",
            "Stundenlanges Schreiben und Lesen wird für Nacken und Handgelenke spürbar angenehmer.",
            "De longues heures de lecture et de saisie deviennent plus agréables pour la nuque et les poignets.",
        ),
        (
            "Soft feet protect the table top.",
            "Weiche Füße schonen die Tischplatte.",
            "Des patins souples protègent le plateau.",
        ),
        (
            "It goes well with the other pieces of the series, which can be added one by one.",
            "Passt zu den anderen Teilen der Serie, die sich nach und nach ergänzen lassen.",
            "S'accorde avec les autres éléments de la série, à compléter petit à petit.",
        ),
    ),
    "Garden": (
        (
            "It may stay outside all year, in sun, rain and snow.",
            "Darf das ganze Jahr draußen bleiben, bei Sonne, Regen und Schnee.",
            "Peut rester dehors toute l'année, au soleil, sous la pluie et sous la neige.",
        ),
        (
            "With time the surface takes on a beautiful patina.",
            "Mit der Zeit bekommt die Oberfläche eine schöne Patina.",
            "Avec le temps, la surface prend une belle patine.",
        ),
        (
            "A small gift for the balcony gardener, a reliable tool for the large vegetable patch.",
            "Ein kleines Geschenk für den Balkon, ein zuverlässiger Begleiter für das große Gemüsebeet.",
            "Un petit cadeau pour le balcon, un allié fiable pour le grand potager.",
        ),
        (
            "Rinse it with the garden hose and it is ready for the next season.",
            "Einmal mit dem Gartenschlauch abspülen, und die nächste Saison kann kommen.",
            "Un coup de jet d'eau, et tout est prêt pour la saison suivante.",
        ),
        (
            "Developed together with gardeners of a botanical garden.",
            "Gemeinsam mit den Fachleuten eines botanischen Gartens entwickelt.",
            "La mise au point s'est faite avec les jardiniers d'un jardin botanique.",
        ),
    ),
    "Pets": (
        (
            "Strong seams withstand teeth, claws and many rounds in the washing machine.",
            "Kräftige Nähte halten Zähnen, Krallen und vielen Runden in der Waschmaschine stand.",
            "Les coutures solides résistent aux dents, aux griffes et aux nombreux passages en machine.",
        ),
        (
            "Measure chest and neck before you order; a table of sizes is in the pictures.",
            "Vor dem Bestellen bitte Brust und Hals messen, eine Größentabelle findet sich bei den Bildern.",
            "Mesurez le poitrail et le cou avant de commander ; un tableau des tailles figure parmi les photos.",
        ),
        (
            "Hair brushes off easily.",
            "Haare lassen sich leicht abbürsten.",
            "Les poils se brossent facilement.",
        ),
        (
            "Free of harmful dyes, so that licking and chewing do no harm.",
            "Frei von schädlichen Farbstoffen, damit Lecken und Kauen nichts ausmachen.",
            "Sans colorants nocifs : lécher et mordiller ne pose aucun problème.",
        ),
        (
            "Vets and trainers helped us to find the right shape for animals of every age.",
            "Tierärztinnen und Trainer haben uns geholfen, die richtige Form für Tiere jeden Alters zu finden.",
            "Des vétérinaires et des éducateurs nous ont aidés à trouver la bonne forme pour les animaux de tout âge.",
        ),
    ),
}
