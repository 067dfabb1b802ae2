// The server of y-websocket; YPERSISTENCE names the folder of its LevelDB: node y-websocket.mjs PORT
import http from 'node:http'
import { setupWSConnection } from '@y/websocket-server/utils'
import { WebSocketServer } from 'ws'

const server = http.createServer()
new WebSocketServer({ server }).on('connection', setupWSConnection)
server.listen(Number(process.argv[2]), '127.0.0.1')
