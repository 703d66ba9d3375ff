"""The words of `boilerplate`, by language. Case, punctuation and underscores do not count, except in `LABELS`.

Before adding one, ask whether an image can show it: "next" and "read more" cannot be seen; a menu, a slide and a carousel can.
"""

# Whole captions, separated by commas.
PHRASES = {
    "en": """
        alt, alt text, alt tag, alternative text, alternate text, image description, no description,
        no description available, no caption, no title, no name, no alt text, no alt, untitled, untitled design,
        untitled document, unnamed, undefined, null, none, nan, n/a, nil, unknown, default, default title, title, caption,
        description, insert text here, enter caption, object object, giphy, via giphy, add a caption, type something,
        test, asdf, blank, empty, spacer, pixel, sample text, example, temp, tmp, logo, site logo, company logo,
        brand logo, store logo, header logo, footer logo, website logo, our logo, the logo, icon, default icon,
        placeholder icon, site icon, favicon, avatar, user avatar, gravatar, banner, banner ad, placeholder,
        background image, bg, header, footer, hero image, sidebar, thumbnail, thumbnails, thumb, preview, featured, cover,
        profile, my profile, attachment, attachments, file, files, asset, gallery, photo gallery, slideshow, screenshot,
        screen shot, screen capture, capture, snapshot, fullsizerender, full size render, loading, loading image,
        please wait, loading please wait, coming soon, not available, unavailable, not found, page not found,
        file not found, 404 not found, error, missing, removed, deleted, no longer available, sorry, under construction,
        lorem ipsum, header bg, bg image, home banner, ajax loader, close button, menu button, search button,
        deal of the day, featured products, cancel reply, share this on, forbidden, subscribe on youtube, 403 forbidden,
        access denied, enable cookies, we value your privacy, skip ad, close ad, sign in with google,
        sign in with facebook, return to top, price on request, call for price, wishlist, quantity, press to zoom,
        card image cap, advertisement, advertisements, sponsored, sponsored content, promoted, promo, ad, ads,
        affiliate link, read more, read on, continue reading, keep reading, read full article, read the full article,
        read article, learn more, find out more, see more, see all, show more, show all, show less, load more, view more,
        view all, view details, view profile, view gallery, view product, view post, view cart, quick view, quickview,
        quick look, quick shop, more, more info, more information, more details, details, info, click, click me, tap here,
        enlarge, zoom in, zoom out, click to enlarge, click to zoom, click to view, hover to zoom, roll over to zoom,
        tap to zoom, tap to enlarge, full screen, fullscreen, toggle fullscreen, full size, fullsize, next, previous,
        prev, next page, previous page, next post, previous post, older posts, newer posts, older, newer, next slide,
        previous slide, skip to content, skip to main content, skip navigation, go back, back to top, back to home,
        scroll to top, scroll down, to top, go to top, open menu, close menu, main menu, toggle menu, toggle navigation,
        navigation, homepage, home page, site map, sitemap, search this site, search for, search results, no results,
        no results found, submit, send, cancel, continue, log in, login, log out, logout, sign in, sign up, sign out,
        register, subscribe, unsubscribe, subscribe to our newsletter, newsletter, enter your email,
        enter your email address, my account, create account, create an account, forgot password, contact, contact us,
        about us, about me, about, faq, faqs, privacy, privacy policy, terms of use, terms of service,
        terms and conditions, terms & conditions, disclaimer, legal notice, imprint, cookie policy, cookie settings,
        cookie preferences, accept cookies, accept all cookies, accept all, manage cookies, cookie consent,
        all rights reserved, play video, watch video, watch now, watch the video, video player, play now, listen now,
        download, downloads, download pdf, download now, download here, free download, download for free, download image,
        save image, save as, print this, print this page, print page, printer friendly, pdf, rss, rss feed, pin it,
        pin this, pinit, pinned, repin, save, tweet, tweet this, retweet, share, share this, share it, share now,
        share this post, share this page, share this article, share this image, share this photo, share button,
        share buttons, follow, follow us, follow me, like, like us, like this, like button, email this, email a friend,
        send to a friend, tell a friend, e-mail this, bookmark this, embed, copy link, copied, social media icons,
        social icons, leave a comment, leave a reply, leave comment, post a comment, post comment, add a comment,
        add comment, write a comment, comments, comment, reply, no comments, comments off, comments closed,
        comments are closed, view comments, rate this, rate it, rate this item, rate this product, write a review,
        add a review, leave a review, read reviews, reviews, review, customer reviews, ratings, rating, star rating,
        be the first to review, add to cart, added to cart, add to basket, add to bag, add to wishlist, add to wish list,
        add to favorites, add to favourites, add to list, add to compare, compare, select options, choose options, buy,
        buy it, buy now, buy it now, shop now, shop all, order now, book now, checkout, proceed to checkout, out of stock,
        in stock, sold out, sold, new arrival, new arrivals, best seller, best sellers, bestseller, sale, on sale,
        special offer, clearance, free shipping, free delivery, size chart, size guide, related products, related posts,
        related articles, related items, you may also like, you might also like, recommended, recommended for you,
        customers also bought, get started, get it now, try it free, try now, start now, call us, call us today, call now,
        contact us today, sign up today, join now, join us, join us today, donate, donate now, apply now, get a quote,
        request a quote, subscribe now, picture of the day, photo of the day, image of the day, pic of the day,
        image source, photo source, image credit, photo credit, picture credit, image courtesy, getty images,
        stock photography, royalty free, clip art, clipart, verified, posted in, filed under, uncategorized,
        uncategorised, tags, categories, archives, by admin, admin, administrator, by guest, by anonymous, by author,
        enter caption here
    """,
    "de": """
        kontakt, fotogalerie, bildergalerie, weiterlesen, mehr erfahren, mehr lesen, mehr anzeigen, mehr infos,
        mehr informationen, zum vergrößern klicken, klicken zum vergrößern, zum vergrößern anklicken, vergrößern,
        in den warenkorb, zum warenkorb, jetzt kaufen, jetzt bestellen, nicht verfügbar, ausverkauft, nach oben,
        alle rechte vorbehalten, impressum, datenschutz, startseite, teilen, auf facebook teilen, kommentar schreiben,
        anmelden, weiter, zurück, platzhalter, unbenannt, ohne titel, unbekannt, bildbeschreibung, bildquelle,
        bildnachweis, herunterladen, drucken, werbung, anzeige
    """,
    "fr": """
        galerie photo, galerie photos, galerie d'images, lire la suite, en savoir plus, voir plus, voir tout, agrandir,
        cliquez pour agrandir, cliquer pour agrandir, ajouter au panier, acheter, tous droits réservés, non disponible,
        indisponible, mentions légales, accueil, partager, partager sur facebook, laisser un commentaire, suivant,
        précédent, retour, sans titre, inconnu, par défaut, télécharger, imprimer, publicité
    """,
    "es": """
        galería de fotos, galería de imágenes, foto de archivo, aviso legal, política de privacidad, leer más, ver más,
        saber más, ver todo, ampliar, haz clic para ampliar, clic para ampliar, añadir al carrito, agregar al carrito,
        comprar, comprar ahora, todos los derechos reservados, no disponible, compartir, compartir en facebook, siguiente,
        anterior, volver, inicio, sin título, sin nombre, desconocido, descargar, imprimir, publicidad,
        deja un comentario, dejar un comentario
    """,
    "it": """
        leggi tutto, leggi di più, continua a leggere, scopri di più, clicca per ingrandire, ingrandisci,
        aggiungi al carrello, acquista ora, tutti i diritti riservati, non disponibile, condividi, condividi su facebook,
        successivo, precedente, indietro, senza titolo, sconosciuto, scarica, pubblicità, lascia un commento
    """,
    "pt": """
        leia mais, saiba mais, ver mais, veja mais, clique para ampliar, adicionar ao carrinho, comprar agora,
        todos os direitos reservados, não disponível, indisponível, compartilhar, compartilhar no facebook, próximo,
        voltar, sem título, desconhecido, baixar, deixe um comentário
    """,
    "nl": """
        lees meer, meer lezen, meer informatie, klik om te vergroten, klik voor vergroting, in winkelwagen, in winkelmand,
        bestel nu, alle rechten voorbehouden, niet beschikbaar, delen, deel op facebook, volgende, vorige, zonder titel,
        onbekend, reactie plaatsen
    """,
    "pl": """
        czytaj więcej, czytaj dalej, więcej, zobacz więcej, kliknij aby powiększyć, powiększ, dodaj do koszyka,
        do koszyka, kup teraz, wszelkie prawa zastrzeżone, niedostępny, udostępnij, następny, następna, poprzedni,
        poprzednia, wstecz, bez tytułu, bez nazwy, nieznany, pobierz, drukuj
    """,
    "sv da no fi cs ro hu": """
        läs mer, köp nu, lägg i varukorgen, lägg i varukorg, klicka för att förstora, klicka för större bild, læs mere,
        les mer, lue lisää, číst dále, více informací, přidat do košíku, do košíku, citește mai mult, citeste mai mult,
        adaugă în coș, adauga in cos, olvass tovább, tovább, kosárba
    """,
    "ru uk": """
        контакты, фотогалерея, читать далее, читать дальше, подробнее, узнать больше, ещё, еще, показать ещё,
        показать еще, смотреть все, нажмите чтобы увеличить, увеличить, добавить в корзину, в корзину, купить,
        купить сейчас, заказать, все права защищены, недоступно, нет в наличии, поделиться, далее, назад, вперёд, вперед,
        главная, поиск, без названия, без имени, неизвестно, скачать, реклама, оставить комментарий, читати далі,
        детальніше, купити, в кошик
    """,
    "tr": """
        devamını oku, daha fazla, daha fazla bilgi, büyütmek için tıklayın, sepete ekle, satın al, tüm hakları saklıdır,
        paylaş, sonraki, önceki, isimsiz, adsız
    """,
    "el vi id": """
        διαβάστε περισσότερα, περισσότερα, προσθήκη στο καλάθι, xem thêm, đọc thêm, chi tiết, thêm vào giỏ hàng, mua ngay,
        selengkapnya, baca selengkapnya, beli sekarang
    """,
    "ja": """
        写真一覧, プライバシーポリシー, お問い合わせ, 続きを読む, もっと見る, もっと読む, 詳細を見る, 詳しくはこちら,
        詳細はこちら, カートに入れる, カートに追加, クリックで拡大, クリックすると拡大します,
        画像をクリックすると拡大します, 拡大する, 拡大表示, 拡大画像, 画像を拡大, 画像なし, 画像はありません,
        画像がありません, 画像準備中, 写真準備中, 写真なし, 準備中, 無題, 前へ, 次へ, 戻る, トップへ戻る, ページトップへ,
        ホーム, 検索, シェア, ツイート, 商品画像, イメージ画像, アイキャッチ画像, サムネイル, サムネイル画像, メイン画像,
        プロフィール画像, 広告, ダウンロード, 在庫切れ, 代替テキスト, ノーイメージ, スクリーンショット
    """,
    "zh": """
        联系我们, 隐私政策, 图片来源, 点击放大, 点击查看大图, 点击查看, 查看大图, 查看更多, 查看详情, 阅读更多, 阅读全文,
        更多, 了解更多, 加入购物车, 立即购买, 暂无图片, 暂无照片, 无图片, 没有图片, 图片加载中, 图片加载失败, 图片不存在,
        图片描述, 图片说明, 产品图片, 商品图片, 缩略图, 封面, 头像, 用户头像, 默认头像, 上一页, 下一页, 上一张, 下一张,
        首页, 返回, 返回顶部, 搜索, 分享, 下载, 广告, 未命名, 无标题, 加载中, 版权所有, 在这里插入图片描述, 点击图片放大,
        配图, 插图, 截图, 屏幕截图, 點擊放大, 閱讀更多, 繼續閱讀, 加入購物車, 暫無圖片, 無圖片, 縮圖, 上一頁, 下一頁,
        首頁, 搜尋, 下載, 廣告, 版權所有
    """,
    "ko": """
        문의하기, 더 보기, 더보기, 자세히 보기, 자세히, 장바구니 담기, 장바구니, 구매하기, 바로구매, 클릭하면 확대, 확대,
        이전, 다음, 홈, 검색, 공유, 공유하기, 다운로드, 광고, 제목 없음, 무제, 썸네일, 대표이미지, 대표 이미지,
        상품이미지, 이미지 없음, 사진 없음, 스크린샷, 이미지 준비중, 본문 이미지, 본문 바로가기
    """,
    "ar fa he hi th": """
        اقرأ المزيد, المزيد, عرض المزيد, أضف إلى السلة, اشتري الآن, جميع الحقوق محفوظة, مشاركة, التالي, السابق, الرئيسية,
        بحث, بدون عنوان, ادامه مطلب, بیشتر, بیشتر بخوانید, افزودن به سبد خرید, קרא עוד, הוסף לסל, כל הזכויות שמורות,
        और पढ़ें, अधिक पढ़ें, और देखें, อ่านเพิ่มเติม, อ่านต่อ, ดูเพิ่มเติม, คลิกเพื่อขยาย, ไม่มีรูปภาพ, ไม่มีภาพ,
        รูปภาพประกอบ
    """,
}

# As phrases, but with the capitals written here: in lower case these words are things that can be seen.
LABELS = frozenset(
    "Home HOME Menu MENU Search SEARCH Back BACK Close CLOSE Print PRINT Play PLAY Open Zoom Share Filter Settings Blog Links "
    "Accueil Menü Menú Suche Suchen Buscar Recherche Zurück Drucken Schließen Меню".split()
)

# (words for an image, words that pages put around them): a caption of such words alone, at least one of the first kind.
BAGS = {
    "en": (
        "image images photo photos photograph photographs picture pictures pic pics img graphic illustration "
        "illustrations thumbnail thumbnails thumb preview noimage nophoto nopic noimg avatar placeholder screenshot "
        "foto fotos",
        "a an the this these that my our your his her no not any more other all one is are was were has have had been "
        "be being can could cannot can't couldn't isn't doesn't does did do will may might sorry oops we us there here "
        "it to for from of in on at by with and or if as yet still soon longer currently temporarily available "
        "unavailable found loaded load loading displayed shown show showing missing removed awaiting pending insert "
        "enter add choose video deleted broken exist exists expired coming error failed unable uploaded provided "
        "selected supported viewable main featured feature default cover header footer hero blog post page article "
        "product item profile user users author member staff team company site website brand category stock free "
        "royalty sample related background large larger larget largest small smaller full fullsize hi high res "
        "resolution low bigger big biggest size sized version original placeholder alt alternate alternative text "
        "title name caption description credit credits source gallery view viewing see open enlarge enlarged zoom "
        "click tap hover press download save share print close next previous prev first last random additional detail "
        "details blank empty dummy test example generic new inline embedded linked uploads upload attached attachment "
        "desktop responsive slider slide carousel slideshow lightbox popup loader lazy intro teaser promo promotional "
        "social media og graph untitled unnamed unknown courtesy copyright protected goes url link file logo icon "
        "banner",
    ),
    "de": (
        "bild bilder foto fotos abbildung abb vorschaubild produktbild produktbilder profilbild titelbild symbolbild "
        "beispielbild platzhalterbild artikelbild hauptbild beitragsbild vorschaubilder headerbild hintergrundbild "
        "symbolfoto",
        "kein keine keinen dieses das die der den ein eine ist sind leider noch nicht mehr verfügbar vorhanden "
        "gefunden zum zur zu vergrößern vergrößert klicken klick anklicken hier auf für in groß großes großer größeres "
        "größere ansehen anzeigen zeigen laden wird geladen folgt herunterladen weitere weiteres alle nächstes "
        "vorheriges von platzhalter vorschau galerie ansicht großansicht",
    ),
    "fr": (
        "image images l'image d'image d'images photo photos photographie photographies illustration",
        "pas aucune cette ces la les l'image de du d'image des une non n'est est plus sans disponible indisponible "
        "trouvée pour sur cliquez cliquer agrandir l agrandie voir afficher suivante précédente produit profil "
        "couverture défaut par à venir bientôt principale manquante l'illustration d'illustration en grand taille "
        "réelle toutes autres description légende",
    ),
    "es": (
        "imagen imágenes imagenes foto fotos fotografía fotografías fotografia ilustración",
        "no hay sin esta la las el de del una disponible disponibles encontrada para ampliar ver clic haga haz click "
        "en aquí más grande siguiente anterior producto perfil portada por defecto destacada principal predeterminada "
        "próximamente todas descripción existe",
    ),
    "it": (
        "immagine immagini foto fotografia fotografie anteprima",
        "non nessuna senza questa la le di del una disponibile disponibili trovata per ingrandire clicca su qui sulla "
        "vedi guarda tutte più grande successiva precedente prodotto profilo copertina evidenza in predefinita "
        "principale è presto arrivo mancante descrizione",
    ),
    "pt": (
        "imagem imagens foto fotos fotografia fotografias ilustração",
        "não nenhuma sem esta a as da de do uma disponível disponíveis encontrada para ampliar clique na aqui ver mais "
        "maior próxima anterior produto perfil capa destaque em destacada padrão principal breve indisponível "
        "descrição",
    ),
    "nl": (
        "afbeelding afbeeldingen foto foto's plaatje plaatjes miniatuur productfoto profielfoto",
        "geen deze de het een niet beschikbaar gevonden vergroten vergroot klik op om te voor hier bekijk toon meer "
        "grotere volgende vorige van product profiel uitgelichte standaard",
    ),
    "pl": (
        "zdjęcie zdjęcia zdjęć obraz obrazek obrazu obrazka fotografia fotografie foto grafika miniaturka",
        "brak nie ma to jest dostępne dostępny kliknij aby powiększyć powiększ zobacz więcej większe następne "
        "poprzednie produktu profilowe główne domyślne w do bez opis wkrótce",
    ),
    "ru": (
        "фото фотография фотографии изображение изображения картинка картинки рисунок фотка снимок миниатюра",
        "нет без это этого отсутствует недоступно недоступна не найдено найдена доступно нажмите на для чтобы "
        "увеличить увеличения посмотреть смотреть показать большое все следующее предыдущее следующая предыдущая "
        "товара профиля пользователя скоро будет по умолчанию главное основное превью описание загрузка загружается "
        "здесь",
    ),
    "uk": (
        "фото фотографія фотографії зображення картинка світлина",
        "немає без це відсутнє недоступне не знайдено натисніть на для щоб збільшити переглянути наступне попереднє "
        "товару профілю скоро буде",
    ),
    "cs sv da no fi hu ro tr id vi": (
        "obrázek obrázky fotka fotky fotografie foto bild bilder bilden billede billeder bilde kuva kuvat valokuva kép "
        "képek fotó fotók poza poze fotografii imagine imagini resim resimler fotoğraf fotoğrafı görsel görüntü gambar "
        "ảnh hình",
        "bez není žádný k dispozici náhled produktu ingen saknas inte tillgänglig större visa ikke tilgængelig "
        "tilgjengelig ei kuvaa suurenna nincs nem elérhető nu este indisponibilă disponibilă fără yok mevcut değil "
        "bulunamadı ürün profil tidak tersedia ada produk không có sản phẩm đại diện minh họa hình ảnh",
    ),
    "ja zh ko ar fa he hi el th": (
        "画像 写真 図 イメージ 图片 照片 圖片 相片 图像 图 圖 이미지 사진 그림 صورة الصورة صور الصور عکس تصویر تصاویر "
        "תמונה תמונות छवि चित्र फोटो तस्वीर εικόνα εικόνες φωτογραφία φωτογραφίες รูปภาพ ภาพ รูป",
        "없음 없습니다 준비중 준비 중 보기 크게 확대 대표 상품 프로필 첨부 큰 원본 이 등록된 غير متوفرة متاحة لا توجد "
        "هذه تكبير عرض المنتج بدون موجود نیست ندارد محصول پروفایل אין זמינה להגדלה नहीं उपलब्ध है कोई δεν υπάρχει "
        "διαθέσιμη χωρίς προϊόντος ไม่มี ประกอบ สินค้า",
    ),
}

# What pages and programs number or date: with a number and no other word, it says nothing.
COUNTED = """
    unbenannt, ohne titel, sans titre, sin título, sem título, bez tytułu, без названия, 未命名, 無題, comments, error,
    test, test image, download, slider, sin titulo, senza titolo, sem titulo, รูปที่, ภาพที่, logo, icon, banner, item,
    page, figure, fig, slide, layer, frame, asset, artboard, gallery, product, attachment, file, header, hero, bg,
    background, untitled, unnamed, scan, snapshot, screen shot, screenshot, screen capture, capture, screen recording,
    whatsapp image, whatsapp photo, whatsapp bild, whatsapp video, fb img, dcim, wp, vid, video, img edited, copy of img,
    image from ios, image uploaded from ios, microsoftteams image, collage, picsart, photogrid, faceapp, pexels photo,
    bildschirmfoto, capture d'écran, captura de pantalla, captura de tela, schermata, zrzut ekranu, снимок экрана,
    скриншот, seite, page n, página, pagina, strona, страница, abbildung, figura, tabelle, table, rysunek, рис,
    スクリーンショット, 屏幕截图, 스크린샷, photo n, image n, image no, photo no, picture no, pic no, image number,
    photo number, product image, gallery image, slider image, main image, image gallery, photo gallery, thumbnail image,
    hero image, stock photo, stock image, bild nr, foto nr, foto n, immagine n, imagen n, copy of, image copy,
    new project, design, sheet
"""

# How cameras and phones name files; four or more digits follow.
CAMERAS = frozenset(
    "dsc dscn dscf dsci dscm dscp dcp img imga imgg imgn imgp imag image mvi mvimg mov pxl sam cimg gopr dji sdc hpim kif pict "
    "pic crw cam photo scan wp snap inshot ezgif received signal telegram snapchat".split()
)
